//! `cargo run --release -p metastore-bench --example run -- put --help`: the load generator without the server.

fn main() -> std::process::ExitCode {
    bench::main_with_args(std::env::args_os().skip(1))
}
