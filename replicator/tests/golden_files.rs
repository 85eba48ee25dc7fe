//! Golden files of what lies on a disk: journal, `state.json`, the documents of the daemons, the
//! configuration. They may change only together with their version.
//!
//! `SECONDSITE_BLESS=1 cargo test --release -p secondsite --test golden_files` writes the files
//! anew; do that only for a new version of a layout.

mod target_support;

use secondsite::config::{AgentConfig, ControlConfig, ReplicaDevice, TargetConfig};
use secondsite::daemon::agent_side::Enrolment;
use secondsite::daemon::orders::{Ledger, Orders};
use secondsite::daemon::state::{decode, encode};
use secondsite::target::disk::Disk;
use secondsite::target::disk::memory::MemoryDisk;
use secondsite::target::journal::Place;
use secondsite::target::state::{CopyRecord, Promoting, StateRecord};
use secondsite_control::api::{
    AgentAssignment, AgentReport, Order, OrderKind, OrderState, TargetAssignment,
};
use secondsite_format::ids::{Epoch, Generation};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;
use target_support::{
    KEY, Put, SERVER, SYNC, Script, VOLUME, VOLUME_BYTES, apply, content, open, sync_frame,
};

const SEGMENT: &str = "journal/00000001.seg";

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The text of a golden file, written anew first if that was asked for.
fn golden(name: &str, now: &str) -> String {
    if std::env::var_os("SECONDSITE_BLESS").is_some() {
        std::fs::write(path(name), now).unwrap();
    }
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn hex(bytes: &[u8]) -> String {
    let row = |row: &[u8]| row.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    bytes.chunks(16).map(|chunk| row(chunk) + "\n").collect()
}

fn unhex(text: &str) -> Vec<u8> {
    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn epoch() -> Script {
    let first = vec![Put::Fill(1, 0x11), Put::Zero(4, 2), Put::Discard(9, 3)];
    Script::new(1, vec![(1, first), (2, vec![Put::Fill(1, 0x22)])])
}

/// A volume with a first copy and one epoch in its journal.
fn stored() -> MemoryDisk {
    let disk = MemoryDisk::default();
    let keeper = open(disk.clone()).unwrap();
    keeper.copy_begin(SYNC).unwrap();
    keeper.copy_data(&sync_frame(&[Put::Fill(0, 1)])).unwrap();
    keeper.copy_done(SYNC).unwrap();
    epoch().data().iter().for_each(|frame| keeper.data(frame).unwrap());
    keeper.commit(&epoch().commit([0; 32]), &KEY).unwrap();
    disk
}

fn put(disk: &MemoryDisk, name: &str, bytes: &[u8]) {
    let file = disk.create(name).unwrap();
    file.write_at(0, bytes).unwrap();
    file.sync().unwrap();
}

#[test]
fn a_stored_volume_has_its_golden_bytes() {
    let disk = stored();
    let now = |name: &str| disk.read(name, 1 << 20).unwrap().unwrap();
    let segment = golden("segment.hex", &hex(&now(SEGMENT)));
    assert_eq!(segment, hex(&now(SEGMENT)), "the journal's bytes changed");
    let state = String::from_utf8(now("state.json")).unwrap();
    assert_eq!(golden("state-copied.json", &state), state);

    // What is in the files is read back.
    let found = MemoryDisk::default();
    put(&found, "state.json", golden("state-copied.json", &state).as_bytes());
    put(&found, SEGMENT, &unhex(&segment));
    found.create("replica.img").unwrap().truncate(VOLUME_BYTES).unwrap();
    let keeper = open(found.clone()).unwrap();
    let newest = keeper.volume().durable().map(|facts| (facts.epoch, facts.cut_id));
    assert_eq!(newest, Some((Epoch(1), epoch().cut_id)));
    assert!(secondsite::target::promote::promote(&keeper, Epoch(1), &|| true).unwrap());
    let mut model = vec![0; VOLUME_BYTES as usize];
    epoch().frames.iter().for_each(|(_, puts)| apply(&mut model, &content(puts)));
    assert!(found.read("replica.img", VOLUME_BYTES).unwrap().unwrap() == model);
    // And the promoted state, which has every field.
    let promoted = String::from_utf8(found.read("state.json", 1 << 20).unwrap().unwrap()).unwrap();
    assert_eq!(golden("state-promoted.json", &promoted), promoted);
}

#[test]
fn states_have_their_golden_bytes() {
    let text = std::fs::read_to_string(path("state-promoted.json")).unwrap();
    let base = StateRecord::decode(text.as_bytes()).unwrap().base;
    let fresh = StateRecord::fresh((SERVER, VOLUME), VOLUME_BYTES, 4096, "replica.img".into());
    let copying = CopyRecord::Copying { sync: SYNC, cursor: 8192 };
    let promoting = StateRecord {
        replica: "/dev/vg0/db1".into(),
        generation: Generation(2),
        copy: CopyRecord::Copied { sync: SYNC },
        tail: Place { segment: 3, offset: 4096 },
        promoting: Some(Promoting { from: Epoch(1), to: Epoch(4) }),
        base,
        ..fresh.clone()
    };
    let records = [
        ("state-fresh.json", fresh.clone()),
        ("state-copying.json", StateRecord { copy: copying, ..fresh }),
        ("state-promoting.json", promoting),
    ];
    for (name, record) in records {
        let now = String::from_utf8(record.encode()).unwrap();
        let golden = golden(name, &now);
        assert_eq!(golden, now, "{name}");
        assert_eq!(StateRecord::decode(golden.as_bytes()).unwrap(), record, "{name}");
    }
}

fn document<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let now = String::from_utf8(encode(value)).unwrap();
    let golden = golden(name, &now);
    assert_eq!(golden, now, "{name}: the document changed");
    assert_eq!(&decode::<T>(Path::new(name), golden.as_bytes()).unwrap(), value, "{name}");
}

#[test]
fn documents_of_the_daemons_have_their_golden_bytes() {
    let agent = r#"{
        "version": 7, "server_id": "07070707070707070707070707070707", "server_name": "db1",
        "target": "10.0.0.9:7444", "goal_seconds": 30, "volumes": [{
            "id": "09090909090909090909090909090909", "name": "sda", "path": "/dev/sda",
            "size_bytes": 1099511627776, "tracker": "ebpf", "block_bytes": 4096,
            "excluded": [[1073741824, 2147483648]]
        }]
    }"#;
    document("agent-assignment.json", &serde_json::from_str::<AgentAssignment>(agent).unwrap());
    let target = r#"{
        "version": 7, "servers": [{
            "id": "07070707070707070707070707070707", "name": "db1",
            "machine": "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a",
            "active": true, "volumes": [{
                "id": "09090909090909090909090909090909", "name": "sda",
                "size_bytes": 1099511627776, "block_bytes": 4096
            }]
        }]
    }"#;
    document("target-assignment.json", &serde_json::from_str::<TargetAssignment>(target).unwrap());
    let enrolment = Enrolment {
        machine: "5a".repeat(32),
        offered: vec!["/dev/sda".into(), "/dev/vg0/pg".into()],
    };
    document("agent-enrolment.json", &enrolment);

    let failed = OrderState::Failed { exit_code: 75, message: "later".into() };
    let report = |number| AgentReport {
        agent_version: String::new(),
        volumes: Vec::new(),
        orders: [(number, failed.clone())].into(),
        stopped: None,
    };
    let mut orders = Orders::new(Ledger::default());
    for number in [4, 9] {
        orders.receive(Order { number, what: OrderKind::Cut }).unwrap();
        orders.fold(&mut report(number));
        if number == 4 {
            orders.delivered(&report(number).orders).unwrap();
        }
    }
    document("agent-orders.json", orders.ledger());
}

/// Every key of every role. What `setup` and `join` write is compared in `cli_processes`.
#[test]
fn configurations_are_read_as_documented() {
    let read = |name: &str| std::fs::read_to_string(path(name)).unwrap();
    let file = Path::new("role.toml");
    let metrics = Some("127.0.0.1:9743".parse().unwrap());
    let control = ControlConfig {
        metrics,
        listen: "0.0.0.0:7443".parse().unwrap(),
        store: Some("/srv/control".into()),
        certificate_life: Duration::from_secs(7 * 86400),
    };
    assert_eq!(ControlConfig::parse(file, &read("control.toml")).unwrap(), control);
    let target = TargetConfig {
        metrics,
        store: "/srv/secondsite".into(),
        listen: "[::]:7444".parse().unwrap(),
        control: "dr1:7443".into(),
        reserve_bytes: 2 << 30,
        memory_bytes: 512 << 20,
        scratch_bytes: 64 << 30,
        devices: vec![ReplicaDevice {
            server: "db1".into(),
            volume: "sda".into(),
            path: "/dev/vg0/db1".into(),
        }],
    };
    assert_eq!(TargetConfig::parse(file, &read("target.toml")).unwrap(), target);
    let agent = AgentConfig {
        metrics,
        control: "dr1:7443".into(),
        name: "db1".into(),
        memory_bytes: 128 << 20,
        workers: 4,
        allow: vec!["/dev/sda".into()],
    };
    assert_eq!(AgentConfig::parse(file, &read("agent.toml")).unwrap(), agent);
}

#[test]
fn a_run_has_its_golden_bytes() {
    use secondsite::target::tend::merge;
    let disk = stored();
    let keeper = open(disk.clone()).unwrap();
    let layers = keeper.volume().layers();
    assert!(merge(&keeper, &layers, &[Epoch(1)].into(), &|| true).unwrap());
    let name = secondsite::target::run::name(Epoch(0), Epoch(1));
    let now = disk.read(&name, 1 << 20).unwrap().unwrap();
    // Zeros fill header and page; what stands in them is enough.
    let parts = [&now[..112], &now[4080..4096 + 16 + 3 * 32], &now[8192..]].concat();
    assert_eq!(golden("run.hex", &hex(&parts)), hex(&parts), "a run's bytes changed");
}
