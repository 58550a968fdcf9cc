# Replace these by a mirror's, or pin them by digest. Keep both on one Debian
# release: the binary needs at least the glibc that it was linked with.
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST_IMAGE} AS build
WORKDIR /build

# Dependencies, in a layer that only the manifest and the lock file invalidate. The
# stubs are the targets that the manifest names or cargo expects. What was built from
# them is removed: COPY keeps the times of files, so the real sources may be older
# than the stubs' artefacts, and cargo would then take those for up to date.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it \
    && echo '//! A stub.' | tee src/lib.rs build.rs src/main.rs tests/it/main.rs \
    && echo 'fn main() {}' | tee -a build.rs src/main.rs tests/it/main.rs \
    && cargo build --release --locked \
    && cargo clean --release --locked --package user-service

# The service. proto/ is compiled by build.rs; migrations/ is embedded by a macro.
COPY build.rs ./
COPY proto proto
COPY migrations migrations
COPY src src
RUN cargo build --release --locked

# The base has glibc and libgcc, and neither shell nor package manager, so there can be
# no RUN here. There is no PostgreSQL either: DATABASE_URL must be set.
FROM ${RUNTIME_IMAGE}
COPY --from=build /build/target/release/user-service /usr/local/bin/user-service

# A number, so that Kubernetes can verify `runAsNonRoot`.
USER 65532:65532

# The default, 127.0.0.1, cannot be reached from outside the container.
ENV LISTEN_ADDR=0.0.0.0:50051
# For probes, outside all limits of clients.
ENV HEALTH_ADDR=0.0.0.0:50052
EXPOSE 50051 50052

# Readiness, so unhealthy while the database is away. `check` gives up by itself after
# 5 s for the connection and 5 s for the answer.
HEALTHCHECK --interval=10s --timeout=11s --start-period=30s \
    CMD ["/usr/local/bin/user-service", "check", "--addr", "127.0.0.1:50052"]

# Stopping takes up to DRAIN_DELAY_MS + SHUTDOWN_GRACE_MS, 22 s by default. Docker kills
# after 10 s, unless told otherwise: `docker run --stop-timeout 30`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/user-service"]
