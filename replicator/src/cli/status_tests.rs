//! The table of `secondsite status`.

use super::{Rates, table};
use secondsite_control::api::{SCHEMA_VERSION, ServerStatus, Status, VolumePhase, VolumeStatus};
use std::time::{Duration, Instant};

fn server(name: &str, state: &str, progress: Option<(u64, u64)>, sent: u64) -> ServerStatus {
    let volume = VolumeStatus {
        name: "sda".into(),
        path: "/dev/sda".into(),
        size_bytes: 480 << 30,
        phase: VolumePhase::Following,
        reason: String::new(),
        tracker: "ebpf".into(),
        tracker_reason: String::new(),
        cut: "quiet".into(),
        progress_bytes: progress,
        backlog_bytes: 0,
        sent_bytes: sent,
        compares: 0,
        epoch: None,
        promoted_epoch: None,
        replica: None,
    };
    ServerStatus {
        name: name.into(),
        state: state.into(),
        reason: String::new(),
        loss_seconds: None,
        backlog_bytes: 0,
        goal_seconds: 30,
        heard_seconds: Some(1.0),
        certificate_ends: String::new(),
        volumes: vec![volume],
    }
}

fn status(servers: Vec<ServerStatus>) -> Status {
    Status { schema_version: SCHEMA_VERSION, servers, warnings: Vec::new() }
}

#[test]
fn one_look() {
    let mut web1 = server("web1", "protected", None, 0);
    web1.loss_seconds = Some(4.2);
    web1.backlog_bytes = 1_258_291;
    let mut app3 = server("app3", "behind", None, 0);
    app3.loss_seconds = Some(430.0);
    app3.backlog_bytes = 6_657_199_309;
    app3.goal_seconds = 60;
    let db1 = server("db1", "first copy", Some((999, 1000)), 0);
    let text = table(&[db1, web1, app3], &Rates::default());
    let expected = "\
SERVER  STATE            LOSS IF IT DIED NOW  GOAL
db1     first copy 99 %  no point yet         30s
web1    protected        4 s · 1.2 MiB        30s
app3    BEHIND           7 min · 6.2 GiB      1min
";
    assert_eq!(text, expected);
}

#[test]
fn a_second_look_gives_rates_and_remaining_time() {
    let start = Instant::now();
    let mut rates = Rates::default();
    let look =
        |done, sent| status(vec![server("db1", "first copy", Some((done, 10_000_000_000)), sent)]);
    rates.see(&look(0, 0), start);
    assert!(!rates.known());
    let second = look(1_000_000_000, 980_000_000);
    rates.see(&second, start + Duration::from_secs(10));
    let text = table(&second.servers, &rates);
    assert!(text.contains("first copy 10 %, 90 s"), "{text}");
    assert!(text.contains("98 MB/s"), "{text}");
    // The agent restarts and counts from zero: nothing is said rather than nonsense.
    rates.see(&look(1_000_000_000, 5), start + Duration::from_secs(11));
    assert_eq!(rates.sent("db1"), None);
}
