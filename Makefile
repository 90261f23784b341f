# `make help` lists what there is to make. Nothing here needs hardware virtualization: see tests/src/host/.

TARGET  := $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-gnu
HOST    := $(TARGET)/debug/berth-host
# What runs in the host is what ships.
PROGRAMS := --programs $(TARGET)/release
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
DEB     := $(or $(CARGO_TARGET_DIR),target)/debian/berth_$(VERSION)_amd64.deb
CACHE   := $(or $(BERTH_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/berth)
SHELL   := /bin/bash
# Where rustup puts cargo.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help setup run check test bench soak host-shell lint deny fmt unit host-tests guests fuzz-smoke tools programs deb package clean-cache

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## install what building and testing need (Debian 12; elsewhere it says what is missing)
	@resources/setup.sh

run: setup programs ## start berthd, and a shell in a Debian guest on this terminal; leave with `exit`
	$(HOST) run --tty $(PROGRAMS) --with run-berth=resources/run-berth.sh -- run-berth

check: lint unit ## the inner loop: lint and unit tests

# In one recipe, for the order. The guests' count comes last but for the fuzzers.
test: setup ## everything: lint, unit tests, the host's tests, tests with guests, a short run of each fuzzer
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory deny
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory host-tests
	$(MAKE) --no-print-directory guests
	$(MAKE) --no-print-directory fuzz-smoke

bench: setup programs ## measure boots and devices beside QEMU's microvm; RUNS=20 for a surer median, PART=disk for a part
	$(HOST) run $(PROGRAMS) --memory 6144 --processors $(or $(PROCESSORS),1) -- berth-bench --runs $(or $(RUNS),5) $(PART)

deb: setup package ## the Debian package, in target/debian/ (docs/install.md)

soak: setup package ## the long proofs: tests with guests at full length, ten minutes of each fuzzer; FILTER as above
	$(HOST) test --soak $(PROGRAMS) --with berth.deb=$(DEB) $(FILTER)
	tests/fuzz/run.sh $(or $(FUZZ_SECONDS),600)

host-shell: setup programs ## a shell in the host that guests run in
	$(HOST) shell $(PROGRAMS)

lint: ## formatting and clippy, no warning allowed
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

# Built once, in about five minutes; no package of Debian's has it.
DENY_VERSION := 0.20.2
DENY := $(CACHE)/cargo-deny-$(DENY_VERSION)

deny: $(DENY)/bin/cargo-deny ## licences, sources and versions of the dependencies
	$< --log-level error check --hide-inclusion-graph licenses bans sources

$(DENY)/bin/cargo-deny:
	cargo install --locked --quiet --root $(DENY) cargo-deny --version $(DENY_VERSION)

fmt: ## format the code
	cargo fmt --all

# The commands first: a test judges our archive by the cpio that is installed.
unit: tools ## tests that need no guest
	$(TARGET)/debug/berth-assets tools
	cargo test --workspace --exclude berth-tests --quiet
	cargo test --package berth-tests --lib --bins --quiet

# The files of tests/tests/ named here_* try the host and what it is made of, from outside; the others run inside it.
host-tests: programs
	cargo test --package berth-tests --test 'here_*' --quiet

guests: package ## the tests with guests; FILTER=part of a name runs a few
	$(HOST) test $(PROGRAMS) --with berth.deb=$(DEB) $(FILTER)

fuzz-smoke:
	@if [ -x tests/fuzz/run.sh ]; then tests/fuzz/run.sh; fi

tools:
	cargo build --package berth-tests --bins --quiet

programs: tools
	cargo build --release --package agent --package cli --package jailer --package supervisor --package vmm --bins --quiet

package: programs
	@resources/deb/build.sh $(TARGET)/release $(dir $(DEB))

clean-cache: ## remove kernels, images and saved hosts; they are made anew when needed
	rm -rf "$(CACHE)"
