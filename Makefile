# A newcomer needs `make run` and `make test`; `make` lists the rest.

TOOLS := $(CURDIR)/.tools
BUF_VERSION := 1.75.0
CARGO_DENY_VERSION := 0.20.2
BUF := $(TOOLS)/node_modules/.bin/buf
PYTHON := $(TOOLS)/venv/bin/python
CARGO_DENY := $(TOOLS)/bin/cargo-deny

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: run
run: $(if $(DATABASE_URL),,postgres) ## Run the service, on a private PostgreSQL unless DATABASE_URL is set
	cargo run --release

.PHONY: test
test: postgres $(BUF) $(PYTHON) ## Run all tests
	cargo test --locked
	GROUPING=off cargo test --locked --test it

.PHONY: lint
lint: $(BUF) $(CARGO_DENY) ## Check formatting, code, protos, and dependencies' licences
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	cargo fmt --check --manifest-path bench/Cargo.toml
	cargo clippy --all-targets --locked --manifest-path bench/Cargo.toml --target-dir target -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --locked --quiet
	$(BUF) lint
	$(BUF) format --diff --exit-code
	$(CARGO_DENY) check licenses bans sources

.PHONY: bench
bench: postgres binaries ## Measure the service beside pgbench: some minutes, on a quiet machine
	target/release/bench --out docs/performance

.PHONY: bench-scale
bench-scale: postgres binaries ## The same with 10 million users as well
	target/release/bench --scale --out docs/performance

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

# What the targets need. A missing program comes from the distribution's packages
# where we know how to get it, or the target says what to install.

# $(call need,PROGRAM THAT SHOULD WORK,DEBIAN PACKAGES,WHAT TO SAY)
define need
	@$(1) >/dev/null 2>&1 || { \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			apt-get update -qq && apt-get install -y -qq $(2); \
		elif command -v apt-get >/dev/null && command -v sudo >/dev/null; then \
			sudo apt-get update -qq && sudo apt-get install -y -qq $(2); \
		else \
			echo "Please install $(3)." >&2; exit 1; \
		fi; }
endef

.PHONY: postgres
postgres:
	$(call need,command -v initdb || ls /usr/lib/postgresql/*/bin/initdb /opt/homebrew/opt/postgresql*/bin/initdb /usr/local/opt/postgresql*/bin/initdb | grep .,postgresql,the server of PostgreSQL 14 or later or set DATABASE_URL)

.PHONY: venv
venv:
	$(call need,python3 -c 'import venv$(comma) ensurepip',python3-venv,Python 3 with venv)

$(BUF):
	$(call need,command -v npm,nodejs npm,Node.js with npm)
	npm install --silent --no-fund --no-audit --prefix $(TOOLS) @bufbuild/buf@$(BUF_VERSION)
	@touch $@

$(PYTHON): tests/clients/requirements.txt | venv
	python3 -m venv $(TOOLS)/venv
	$@ -m pip install --quiet --requirement $<
	@touch $@

$(CARGO_DENY):
	cargo install --quiet --locked --debug --no-default-features --root $(TOOLS) cargo-deny@$(CARGO_DENY_VERSION)

comma := ,
