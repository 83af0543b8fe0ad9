# make run    start a node (builds it first): clients at http://localhost:2379, data in ./default.metastore
# make test   the whole test suite
# make check  what must pass before a change lands: lint, deny, test
# make bench  the benchmarks
# Flags for the node: make run ARGS="--storage memory"

.PHONY: run test check lint deny bench deps test-deps

run: deps
	cargo run --locked --release -p metastore -- $(ARGS)

test: test-deps
	cargo test --locked --workspace

check: lint deny test

lint: test-deps
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

deny:
	scripts/deny.sh

bench: test-deps
	cargo bench --locked --workspace

deps:
	@scripts/deps.sh

test-deps:
	@scripts/deps.sh tests
