# `make run` and `make test` are enough for a start; `make` lists the other targets.

TOOLS := $(CURDIR)/.tools
BUF_VERSION := 1.75.0
GRPC_JS_VERSION := 1.14.7
PROTO_LOADER_VERSION := 0.8.1
CARGO_DENY_VERSION := 0.20.2
BUF := $(TOOLS)/node_modules/.bin/buf
GRPC_JS := $(TOOLS)/node_modules/@grpc/grpc-js/package.json
PYTHON := $(TOOLS)/venv/bin/python
CARGO_DENY := $(TOOLS)/bin/cargo-deny

# The last release, as an image of the protos. A release replaces it:
# `.tools/node_modules/.bin/buf build proto --output proto/baseline.binpb`
PROTO_BASELINE := proto/baseline.binpb

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: setup
setup: setup-run setup-test setup-lint ## Install everything that run, test and lint need

.PHONY: setup-run setup-test setup-lint
setup-run: rust $(if $(DATABASE_URL),,postgres)
setup-test: rust postgres $(BUF) $(GRPC_JS) $(PYTHON)
setup-lint: rust $(BUF) $(CARGO_DENY)

.PHONY: run
run: setup-run ## Run the service, on a private PostgreSQL unless DATABASE_URL is set
	cargo run --release

.PHONY: test
test: setup-test ## Run all tests, with request coalescing and without
	cargo test --locked
	REQUEST_COALESCING=off cargo test --locked --test it

# A copy, because the patch changes the contract; its build is kept in target/example.
.PHONY: example
example: rust git postgres ## Check the worked example of CONTRIBUTING.md: a new field
	rm -rf target/example/source && mkdir -p target/example/source
	git ls-files -z | xargs -0 cp --parents --target-directory target/example/source
	GIT_CEILING_DIRECTORIES=$(CURDIR)/target/example git -C target/example/source apply $(CURDIR)/docs/add-a-field.patch
	cd target/example/source && CARGO_TARGET_DIR=.. cargo test --locked --test it -- locale_is_created

.PHONY: lint
lint: setup-lint breaking ## Check formatting, code, protos, and dependencies' licences
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	cargo fmt --check --manifest-path bench/Cargo.toml
	cargo clippy --all-targets --locked --manifest-path bench/Cargo.toml --target-dir target -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --locked --quiet
	$(BUF) lint proto
	$(BUF) format proto --diff --exit-code
	$(CARGO_DENY) check licenses bans sources

.PHONY: breaking
breaking: $(BUF) ## Check that the protos are compatible with the last release
	$(BUF) breaking proto --against $(PROTO_BASELINE)

# Fetching is a step of its own: an advisory fails the target, a missing network does not.
.PHONY: advisories
advisories: rust git $(CARGO_DENY) ## Check dependencies against the RustSec advisory database
	@if $(CARGO_DENY) fetch db; then \
		$(CARGO_DENY) check advisories; \
	else \
		echo "NOT CHECKED: the advisory database cannot be fetched. No advisory was looked at." >&2; \
	fi

.PHONY: bench
bench: postgres binaries ## Measure the service beside pgbench: some minutes, on a quiet machine
	target/release/bench --out docs/performance

.PHONY: bench-scale
bench-scale: postgres binaries ## The same with 10 million users as well
	target/release/bench --scale --out docs/performance

.PHONY: bench-week
bench-week: postgres binaries ## Measure two weeks of writes with compressed time: three minutes
	target/release/bench --week --out docs/performance

.PHONY: bench-baseline
bench-baseline: postgres binaries ## Compare the service with an older binary: BASELINE=path
	target/release/bench --baseline $(BASELINE) --only-baseline

.PHONY: bench-comparison
bench-comparison: postgres venv binaries ## Measure the service beside Python stacks
	python3 -m venv $(TOOLS)/comparison-venv
	$(TOOLS)/comparison-venv/bin/python -m pip install --quiet --requirement bench/comparison/requirements.txt
	target/release/bench --comparison $(TOOLS)/comparison-venv/bin/python --out docs/performance

.PHONY: binaries
binaries:
	cargo build --release --locked
	cargo build --release --locked --manifest-path bench/Cargo.toml --target-dir target

.PHONY: image
image: ## Build the container image
	docker build --tag user-service .

.PHONY: clean
clean: ## Remove what was built and installed here
	rm -rf target .tools

# What the targets need. A missing program is installed from the distribution's packages
# on Debian and Ubuntu, as root or by sudo. Elsewhere the target says what to install.

# $(call need,COMMAND THAT SUCCEEDS IF IT IS THERE,DEBIAN PACKAGES,WHAT TO INSTALL ELSEWHERE)
define need
	@{ $(1); } >/dev/null 2>&1 || { \
		if ! command -v apt-get >/dev/null; then sudo=none; \
		elif [ "$$(id -u)" = 0 ]; then sudo=; \
		elif command -v sudo >/dev/null; then sudo=sudo; \
		else sudo=none; fi; \
		if [ "$$sudo" = none ]; then echo "Please install $(3)." >&2; exit 1; fi; \
		$$sudo apt-get update -qq && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(2); }
endef

# The packages of Debian 12 have a toolchain that is too old, so it is not installed here.
.PHONY: rust
rust:
	@command -v cargo >/dev/null || { \
		echo "Please install a Rust toolchain, 1.92 or later: https://rustup.rs" >&2; exit 1; }
	$(call need,command -v cc,gcc libc6-dev,a C compiler and linker)

.PHONY: postgres
postgres:
	$(call need,command -v initdb || ls $(POSTGRES_INITDB) | grep .,postgresql,the server of PostgreSQL 14 or later or set DATABASE_URL)

POSTGRES_INITDB := /usr/lib/postgresql/*/bin/initdb /usr/local/lib/postgresql/*/bin/initdb \
	/opt/homebrew/opt/postgresql*/bin/initdb /usr/local/opt/postgresql*/bin/initdb

.PHONY: git
git:
	$(call need,command -v git,git,git)

.PHONY: venv
venv:
	$(call need,python3 -c 'import venv$(comma) ensurepip',python3-venv,Python 3 with venv)

$(BUF):
	$(call need,command -v npm,nodejs npm,Node.js with npm)
	npm install --silent --no-fund --no-audit --prefix $(TOOLS) @bufbuild/buf@$(BUF_VERSION)
	@touch $@

$(GRPC_JS): | $(BUF)
	npm install --silent --no-fund --no-audit --prefix $(TOOLS) \
		@grpc/grpc-js@$(GRPC_JS_VERSION) @grpc/proto-loader@$(PROTO_LOADER_VERSION)
	@touch $@

$(PYTHON): tests/clients/requirements.txt | venv
	python3 -m venv $(TOOLS)/venv
	$@ -m pip install --quiet --requirement $<
	@touch $@

$(CARGO_DENY):
	cargo install --quiet --locked --debug --no-default-features --root $(TOOLS) cargo-deny@$(CARGO_DENY_VERSION)

comma := ,
