# make run    start a node (builds it first): clients at http://localhost:2379, data in ./default.metastore
# make test   the whole test suite; at its end a few minutes of real clusters under random faults, where there is Go
# make check  what must pass before a change lands: lint, deny, test
# make bench  the benchmarks
# make bench-check  counts the instructions of the hot paths; fails if one takes more than it did
# make sim    clusters under simulation, all cores, until it is interrupted; DURATION=10m to end, SIM="--seed 7" for one seed
# make fuzz   the fuzz targets, 10 minutes each (scripts/fuzz.sh); needs cargo-fuzz
# make robustness  random faults on a real cluster, on each engine; DURATION=10m SEED=7 for more than 40 s each
# make compat  etcd's own tests and clients in several languages against our binary; compat-ci is a part of a few minutes
# Flags for the node: make run ARGS="--storage memory"

.PHONY: run test check lint deny bench bench-check fuzz robustness sim compat compat-ci deps test-deps

run: deps
	cargo run --locked --release -p metastore -- $(ARGS)

test: test-deps
	cargo test --locked --workspace
	scripts/robustness.sh

sim: deps
	cargo run --locked --release -p metastore-sim -- $(SIM) $(if $(DURATION),--time $(DURATION))

robustness: test-deps
	scripts/robustness.sh

fuzz:
	scripts/fuzz.sh

compat: test-deps
	cargo build --locked --workspace --bin metastore
	compat/check.sh

compat-ci: test-deps
	cargo build --locked --workspace --bin metastore
	compat/check.sh --ci

check: lint deny test compat-ci

lint: test-deps
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

deny:
	scripts/deny.sh

bench: test-deps
	cargo bench --locked --workspace

bench-check: test-deps
	scripts/bench-check.sh

deps:
	@scripts/deps.sh

test-deps:
	@scripts/deps.sh tests
