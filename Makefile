# The front door. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo test test-as-nobody lint bench fuzz kernels deny

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

demo: ## two MPTCP networks: one transfer over two paths, one that loses a path on the way
	@tools/setup demo
	cargo build
	target/debug/braid lab run simple handover --report target/demo

# Cargo starts each test program by its runner, which gives it a place to make network namespaces in.
TEST = cargo test --workspace --config 'target."cfg(all())".runner = ["$(CURDIR)/tools/$(1)"]'

test: ## all tests; without root each test program runs in a user namespace
	@tools/setup test
	$(call TEST,in-namespaces)

test-as-nobody: ## for root: all tests as the user nobody, to show that they need no root
	@tools/setup test
	$(call TEST,as-nobody)

lint: ## formatting, clippy, docs: all without warnings
	@tools/setup lint
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps

bench: ## Braid beside direct connections, the kernel and peers, interleaved, as ratios
	@tools/setup bench
	cargo build --release -p braid -p benches
	target/release/benches

# New inputs go to fuzz/found; what is worth keeping moves to fuzz/corpus, which the unit tests replay.
SECONDS_EACH = 60
fuzz: ## feeds each parser random bytes for a minute (needs cargo-fuzz and a nightly toolchain; SECONDS_EACH=N)
	for target in $$(cargo +nightly fuzz list); do \
		mkdir -p fuzz/found/$$target; \
		cargo +nightly fuzz run $$target fuzz/found/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(SECONDS_EACH) -max_len=128 || exit 1; \
	done

kernels: ## what depends on the kernel, under Debian's 6.1 and 6.12 (fetched, emulated; half an hour), for docs/kernel-policy.md
	@CHECKS="$(CHECKS)" tools/kernels $(KERNELS)

deny: ## licences, advisories and duplicate versions of the dependencies (needs cargo-deny)
	cargo deny check
