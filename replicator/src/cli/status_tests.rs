//! The table of `secondsite status`, and when a watched one prints again.

use super::{Shown, attention, table};
use crate::cli::Context;
use crate::config::Paths;
use secondsite_control::api::{SCHEMA_VERSION, ServerStatus, Status};
use secondsite_control::codes::{Reason, State};
use std::path::Path;
use std::time::{Duration, Instant};

fn server(name: &str, state: State) -> ServerStatus {
    ServerStatus {
        name: name.into(),
        state,
        code: None,
        reason: String::new(),
        since: None,
        loss_seconds: None,
        backlog_bytes: 0,
        goal_seconds: 30,
        history_seconds: None,
        keep_seconds: Some(1_296_000),
        percent: None,
        left_seconds: None,
        sending_bytes_per_second: None,
        heard_seconds: Some(1.0),
        certificate_ends: String::new(),
        volumes: Vec::new(),
    }
}

fn volume() -> secondsite_control::api::VolumeStatus {
    let json = serde_json::json!({
        "name": "sda", "path": "/dev/sda", "size_bytes": 1, "phase": "following", "reason": "",
        "tracker": "ebpf", "tracker_reason": "", "cut": "quiet", "progress_bytes": null,
        "backlog_bytes": 0, "sent_bytes": 0, "compares": 0, "epoch": null, "promoted_epoch": null,
        "replica": null,
    });
    serde_json::from_value(json).unwrap()
}

#[test]
fn one_look() {
    let mut db1 = server("db1", State::FirstCopy);
    (db1.percent, db1.left_seconds) = (Some(34), Some(720.0));
    (db1.sending_bytes_per_second, db1.volumes) = (Some(98e6), vec![volume()]);
    let mut db2 = server("db2", State::FirstCopy);
    (db2.percent, db2.sending_bytes_per_second) = (Some(0), Some(0.0));
    (db2.volumes, db2.backlog_bytes) = (vec![volume()], 4096);
    let mut web1 = server("web1", State::Protected);
    (web1.loss_seconds, web1.backlog_bytes) = (Some(4.2), 1_258_291);
    (web1.sending_bytes_per_second, web1.history_seconds) = (Some(0.6e6), Some(1_296_000.0));
    let mut web2 = server("web2", State::Protected);
    (web2.loss_seconds, web2.sending_bytes_per_second) = (Some(4.2), Some(0.0));
    (web2.history_seconds, web2.keep_seconds) = (Some(0.0), None);
    let mut web3 = web2.clone();
    (web3.name, web3.backlog_bytes) = ("web3".into(), 4096);
    let mut app3 = server("app3", State::Behind);
    (app3.loss_seconds, app3.backlog_bytes) = (Some(430.0), 6_657_199_309);
    (app3.goal_seconds, app3.sending_bytes_per_second) = (60, Some(6e6));
    (app3.history_seconds, app3.keep_seconds) = (Some(68_400.0), Some(86_400));
    let new = server("new", State::Joined);
    let servers = [db1, db2, web1, web2, web3, app3, new];
    let expected = "\
SERVER  STATE                        LOSS IF IT DIED NOW  GOAL  HISTORY       TO TARGET
db1     first copy 34 %, 12 min      no point yet         30s   -             98 MB/s
db2     first copy 0 %, calculating  no point yet         30s   -             0.0 MB/s
web1    protected                    4 s · 1.2 MiB        30s   15 d of 15 d  0.6 MB/s
web2    protected                    4 s · nothing waits  30s   newest        idle
web3    protected                    4 s · 4 KiB          30s   newest        waits for a cut
app3    BEHIND                       7 min · 6.2 GiB      1min  19 h of 24 h  6.0 MB/s
new     joined                       everything           30s   -             off
";
    assert_eq!(table(&servers), expected);
    let paths = Paths::of(Path::new("/etc/secondsite"));
    let context = Context { paths, json: false, yes: false };
    assert_eq!(
        attention(&context, &servers).unwrap(),
        "1 needs attention: app3 -> secondsite explain app3"
    );
    let two = [server("a", State::Away), server("b", State::Stopped)];
    assert_eq!(attention(&context, &two).unwrap(), "2 need attention: a, b -> secondsite explain");
}

#[test]
fn without_a_terminal_a_block_is_printed_for_a_change() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut row = server("db1", State::FirstCopy);
    let mut shown = Shown::default();
    let mut due = |row: &ServerStatus, seconds| {
        let servers = vec![row.clone()];
        let status = Status { schema_version: SCHEMA_VERSION, servers, warnings: Vec::new() };
        shown.is_due(&status, at(seconds))
    };
    assert!(due(&row, 0));
    row.loss_seconds = Some(1.0);
    assert!(!due(&row, 60), "a number that ticks is no change");
    row.percent = Some(1);
    assert!(due(&row, 61));
    row.percent = Some(2);
    assert!(!due(&row, 70), "progress alone waits");
    assert!(due(&row, 71));
    row.code = Some(Reason::TargetFull);
    assert!(due(&row, 72), "another reason does not wait");
}
