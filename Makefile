# The front door. `make` or `make help` lists what there is.
#
# Every cargo call of the dev profile names the whole workspace: the same features are chosen each time, so that
# DataFusion is compiled once and not once per command. Build results live in the user's cache folder.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kalamdb
export CARGO_TARGET_DIR ?= $(CACHE)/target
SHELL := /bin/bash
CLUSTER := e2e/cluster
DENY_VERSION := 0.20.2
DENY := $(CACHE)/tools/cargo-deny-$(DENY_VERSION)
.NOTPARALLEL:
.PHONY: help run test test-unit e2e dev-cluster dev-cluster-down demo bench fmt lint deny tools build unit fmt-check install

help: ## lists these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: install build ## builds and starts one query pod on examples/quickstart, no cluster needed
	exec examples/quickstart/run.sh

demo: install build ## loads this machine's Debian changelogs into a running KalamDB and queries them
	"$$CARGO_TARGET_DIR/debug/kalamdb-bench" demo

dev-cluster: ## a real Kubernetes on this machine with KalamDB and an S3 server on it (root)
	$(CLUSTER)/dev.sh up

dev-cluster-down: ## removes it, without a trace
	$(CLUSTER)/dev.sh down

test: test-unit e2e ## everything: quick tests first, then the real cluster (root)

test-unit: install fmt-check lint build unit deny ## format, lints, licences, all tests that need no cluster, a real S3 server included

e2e: install build ## the tests on a real cluster of their own (root); S3_SERVER=minio for the other S3 server
	$(CLUSTER)/test.sh cargo test --workspace --test cluster -- --test-threads=1

bench: install ## the release build and its figures
	cargo build --release --workspace --bins
	"$$CARGO_TARGET_DIR/release/kalamdb-bench" bench

fmt: ## formats the code
	cargo fmt --all

# `--all-targets` leaves out the cluster tests, because `cargo test` does not run them unless they are named.
lint: ## clippy, warnings are errors
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --test cluster -- -D warnings

# Advisories are left out: they come from the network and may change between two runs of one commit.
deny: $(DENY)/bin/cargo-deny ## licences, sources, duplicate and banned crates
	$< --workspace check bans licenses sources

$(DENY)/bin/cargo-deny:
	cargo install cargo-deny --version $(DENY_VERSION) --locked --root $(DENY) --target-dir $(DENY)/target
	rm -rf $(DENY)/target

tools: ## installs and builds what tests and cluster need, ahead of time
	$(CLUSTER)/install.sh build
	$(CLUSTER)/install.sh test
	$(CLUSTER)/install.sh cluster
	e2e/outside/venv.sh
	for tool in versitygw pause kube; do $(CLUSTER)/build.sh $$tool; done

install:
	@$(CLUSTER)/install.sh build

fmt-check:
	cargo fmt --all --check

build:
	cargo build --workspace --bins

unit:
	@$(CLUSTER)/install.sh test
	python=$$(e2e/outside/venv.sh) && \
	KALAMDB_TEST_REQUIRE_PYTHON=1 KALAMDB_TEST_PYTHON=$$python $(CLUSTER)/s3.sh run cargo test --workspace
