//! Traces of calls, and what becomes of them where there is no collector.

mod support;

use support::{Setup, Storage, temp_dir};

#[tokio::test]
async fn a_collector_that_is_away_is_spoken_of() {
    let base = temp_dir();
    let node = Setup::new(base.path(), Storage::Memory)
        .arg("--enable-distributed-tracing")
        .arg(format!(
            "--distributed-tracing-address=127.0.0.1:{}",
            support::free_port()
        ))
        .arg("--distributed-tracing-sampling-rate=1000000")
        .env("OTEL_BSP_SCHEDULE_DELAY", "50")
        .start();
    let mut client = node.client().await;
    let said = || node.log().matches("traces export: the collector took no spans").count();
    let begun = std::time::Instant::now();
    while said() == 0 {
        client.put("k", "v", None).await.unwrap();
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "{}", node.log());
    }
    // More are lost, and calls go on; the log is told once a minute.
    for _ in 0..20 {
        client.put("k", "v", None).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(said(), 1, "{}", node.log());
}
