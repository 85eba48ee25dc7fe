//! What others rely on: the documents of the API, and migrations that were released.
//!
//! `SECONDSITE_BLESS=1 cargo test --release -p secondsite-control --test golden` writes the files
//! anew; do that only for a field that was added, or a migration that was added.

use secondsite_control::api::{
    AgentAssignment, AgentPoll, AgentReport, EnrolReply, EnrolRequest, InventoryDevice, Order,
    OrderKind, OrderReply, OrderResult, OrderState, Point, PointReport, Points, Problem,
    RenewRequest, SCHEMA_VERSION, ServerEntry, ServerStatus, Servers, Status, TargetAssignment,
    TargetPoll, TargetReport, TargetServer, TargetVolume, TargetVolumeReport, TokenReply,
    TokenRequest, TrackerChoice, VerifyResult, VolumeAssignment, VolumePhase, VolumeReport,
    VolumeStatus, Warning,
};
use secondsite_control::codes::{Reason, State};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::path::PathBuf;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn golden(name: &str, text: &str) -> String {
    let path = folder("tests/golden").join(name);
    if std::env::var_os("SECONDSITE_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The document has these bytes, and these bytes are the document.
fn document<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let text = serde_json::to_string_pretty(value).unwrap() + "\n";
    let golden = golden(&format!("{name}.json"), &text);
    assert_eq!(golden, text, "{name}: the document changed");
    assert_eq!(&serde_json::from_str::<T>(&golden).unwrap(), value, "{name}");
}

fn id(digit: &str) -> String {
    digit.repeat(32)
}

fn device() -> InventoryDevice {
    InventoryDevice {
        name: "sda".into(),
        path: "/dev/sda".into(),
        kind: "disk".into(),
        size_bytes: 1 << 40,
        used_by: "/ /boot, swap".into(),
        swap: vec![("sda2".into(), 1 << 30, 2 << 30)],
        parent: "md0".into(),
        trackers: vec!["ebpf".into(), "compare".into()],
        refused: "why not".into(),
    }
}

fn agent_assignment() -> AgentAssignment {
    AgentAssignment {
        version: 7,
        server_id: id("a"),
        server_name: "db1".into(),
        target: Some("10.0.0.9:7444".into()),
        goal_seconds: 30,
        volumes: vec![VolumeAssignment {
            id: id("b"),
            name: "sda".into(),
            path: "/dev/sda".into(),
            size_bytes: 1 << 40,
            tracker: TrackerChoice::Auto,
            block_bytes: 4096,
            excluded: vec![(1 << 30, 2 << 30)],
            reserve: None,
        }],
    }
}

fn target_assignment() -> TargetAssignment {
    let volume =
        TargetVolume { id: id("b"), name: "sda".into(), size_bytes: 1 << 40, block_bytes: 4096 };
    let server = TargetServer {
        id: id("a"),
        name: "db1".into(),
        machine: "5a".repeat(32),
        keep: None,
        active: true,
        volumes: vec![volume],
    };
    TargetAssignment { version: 7, servers: vec![server] }
}

fn order_states() -> [OrderState; 5] {
    let verify = VerifyResult {
        name: "sda".into(),
        compared_bytes: 1 << 40,
        differing_bytes: 4096,
        differing: vec![(8192, 4096)],
    };
    [
        OrderState::Waiting,
        OrderState::Running { percent: 40, note: "waits".into() },
        OrderState::Done { result: OrderResult::Cut { point: id("c"), exact: true } },
        OrderState::Done { result: OrderResult::Verify { volumes: vec![verify] } },
        OrderState::Failed { exit_code: 75, message: "later".into() },
    ]
}

#[test]
fn what_agents_and_control_say() {
    let poll = AgentPoll {
        assignment: Some(agent_assignment()),
        orders: vec![
            Order { number: 3, what: OrderKind::Cut },
            Order { number: 4, what: OrderKind::Verify },
        ],
    };
    document("agent-poll", &poll);
    let phases = [
        VolumePhase::Connecting,
        VolumePhase::FirstCopy,
        VolumePhase::Comparing,
        VolumePhase::Following,
        VolumePhase::Stopped,
    ];
    let volume = |phase| VolumeReport {
        id: id("b"),
        phase,
        reason: "why".into(),
        code: Some(Reason::DeviceGone),
        tracker: "ebpf".into(),
        tracker_reason: "why no better one".into(),
        tracker_code: Some(Reason::CompareNoEbpf),
        cut: "quiet".into(),
        progress_bytes: Some((1, 2)),
        backlog_bytes: 3,
        sent_bytes: 4,
        compares: 5,
    };
    let report = AgentReport {
        agent_version: "0.1.0".into(),
        volumes: phases.into_iter().map(volume).collect(),
        orders: (1..).zip(order_states()).collect(),
        stopped: Some("another machine".into()),
    };
    document("agent-report", &report);
    document("inventory", &vec![device()]);
}

#[test]
fn what_targets_and_control_say() {
    document("target-poll", &TargetPoll { assignment: Some(target_assignment()) });
    let volume = TargetVolumeReport {
        id: id("b"),
        connected: true,
        copied: true,
        generation: 1,
        epoch: Some(9),
        promoted_epoch: Some(8),
        replica: "/srv/replica.img".into(),
        journal_bytes: 10,
        error: Some("stopped".into()),
        refused: Some("refused".into()),
    };
    let point = PointReport {
        server: id("a"),
        id: id("c"),
        time_ns: 1_795_000_000_123_456_789,
        generation: 1,
        epochs: [(id("b"), 9)].into(),
        consistency: "crash".into(),
        lacking: vec![id("d")],
        reason: "why".into(),
        kept: false,
        name: None,
    };
    let report = TargetReport {
        target_version: "0.1.0".into(),
        volumes: vec![volume],
        points: vec![point],
        free_bytes: 11,
    };
    document("target-report", &report);
}

#[test]
fn what_a_new_machine_and_control_say() {
    let request = EnrolRequest {
        token: "ss1_00".into(),
        request_pem: "PEM".into(),
        name: "db1".into(),
        machine: "5a".repeat(32),
        inventory: vec![device()],
    };
    document("enrol-request", &request);
    let reply = EnrolReply {
        id: id("a"),
        name: "db1".into(),
        certificate_pem: "PEM".into(),
        authority_pem: "PEM".into(),
    };
    document("enrol-reply", &reply);
    document("renew-request", &RenewRequest { request_pem: "PEM".into() });
}

#[test]
fn what_operators_and_control_say() {
    document("token-request", &TokenRequest { role: "agent".into(), ttl_seconds: 3600 });
    let token =
        TokenReply { token: "ss1_00".into(), fingerprint: "SHA256:00".into(), ttl_seconds: 3600 };
    document("token-reply", &token);
    let volume = VolumeStatus {
        name: "sda".into(),
        path: "/dev/sda".into(),
        size_bytes: 1 << 40,
        phase: VolumePhase::Following,
        reason: "why".into(),
        code: Some(Reason::DeviceGone),
        since: Some("2026-11-21T00:00:00Z".into()),
        tracker: "ebpf".into(),
        tracker_reason: "why no better one".into(),
        tracker_code: Some(Reason::CompareNoEbpf),
        cut: "quiet".into(),
        progress_bytes: None,
        backlog_bytes: 3,
        sent_bytes: 4,
        compares: 5,
        epoch: Some(9),
        promoted_epoch: Some(8),
        replica: Some("/srv/replica.img".into()),
    };
    let server = ServerStatus {
        name: "db1".into(),
        state: State::Protected,
        code: Some(Reason::DeviceGone),
        reason: "why".into(),
        since: Some("2026-11-21T00:00:00Z".into()),
        loss_seconds: Some(1.5),
        backlog_bytes: 3,
        goal_seconds: 30,
        history_seconds: Some(86_400.0),
        keep_seconds: Some(1_296_000),
        percent: Some(34),
        left_seconds: Some(12.5),
        sending_bytes_per_second: Some(98.0),
        heard_seconds: Some(0.5),
        certificate_ends: "2026-12-01T00:00:00Z".into(),
        volumes: vec![volume],
    };
    let status = Status {
        schema_version: SCHEMA_VERSION,
        servers: vec![server],
        warnings: vec![Warning { code: Reason::TargetSilent, text: "a warning".into() }],
    };
    document("status", &status);
    let point = Point {
        id: id("c"),
        time: "2026-11-21T00:00:00Z".into(),
        generation: 1,
        epochs: [("sda".into(), 9)].into(),
        consistency: "crash".into(),
        lacking: vec!["sdb".into()],
        reason: "why".into(),
        kept: false,
        name: None,
    };
    document("points", &Points { schema_version: SCHEMA_VERSION, points: vec![point] });
    let entry =
        ServerEntry { id: id("a"), name: "db1".into(), revoked: false, inventory: vec![device()] };
    document("servers", &Servers { schema_version: SCHEMA_VERSION, servers: vec![entry] });
    document("order-reply", &OrderReply { number: 3 });
    document("order-states", &order_states().to_vec());
    let problem = Problem { exit_code: 64, message: "what".into(), hint: "type".into() };
    document("problem", &problem);
}

/// Unknown fields are ignored, so that one side may be newer.
#[test]
fn a_field_that_was_added_harms_nobody() {
    let mut poll = serde_json::json!({ "assignment": null, "orders": [], "later": [1, 2] });
    assert!(serde_json::from_value::<AgentPoll>(poll.clone()).is_ok());
    poll["orders"] = serde_json::json!([{ "number": 3, "what": "cut", "later": true }]);
    assert!(serde_json::from_value::<AgentPoll>(poll).is_ok());
}

/// A database that ran a migration would refuse it edited.
#[test]
fn migrations_that_were_released_are_never_edited() {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder("migrations"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let line = |path: &PathBuf| {
        let bytes = std::fs::read(path).unwrap();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
        let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{hex}  {}\n", path.file_name().unwrap().to_str().unwrap())
    };
    let text: String = files.iter().map(line).collect();
    assert_eq!(golden("migrations.sha256", &text), text, "a migration changed");
}
