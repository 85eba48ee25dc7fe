//! PostgreSQL on a protected volume: whatever exact point is looked at, PostgreSQL recovers from it
//! as from a power cut, nothing in it is damaged, no transaction is missing that was acknowledged
//! before the point's cut, and none is there in part.

use secondsite_tests::block::{LoopDevice, Mount, run};
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::load::Load;
use secondsite_tests::postgres::Postgres;
use secondsite_tests::random::Random;
use secondsite_tests::{soak, wait_until};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const VOLUME_BYTES: u64 = 320 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// Connections that insert numbered rows.
const CLIENTS: usize = 2;

/// What one client was told is committed: when, in nanoseconds since 1970, and which row. It lies
/// in this process, not on the volume.
type Ledger = Arc<Mutex<Vec<(u64, u64)>>>;

#[test]
fn every_point_recovers_with_all_that_was_acknowledged() {
    let mut random = Random::printed("postgres");
    let dir = tempfile::tempdir().expect("a folder");
    // User postgres has to get through it.
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).expect("chmod");
    let device = LoopDevice::sparse(dir.path(), "source.img", VOLUME_BYTES);
    device.format_ext4(&["-b", "4096"]);
    let mount = Mount::new(device.path(), &dir.path().join("mnt"), "defaults");
    let data = mount.path().join("cluster");
    Postgres::init(&data);
    let postgres = Postgres::start(&data, &dir.path().join("socket"));
    postgres.tool("pgbench", &["--initialize", "--quiet", "--scale=1"]);
    postgres.sql("CREATE EXTENSION amcheck; CHECKPOINT");
    postgres.sql("CREATE TABLE rows (client int, row bigint, PRIMARY KEY (client, row))");

    let mut lab = Lab::new();
    lab.join();
    lab.protect(device.path(), &["--rpo", "3s"]).ok();
    lab.wait_for_epoch_after(0, PATIENCE);
    let ledgers: Vec<Ledger> = (0..CLIENTS).map(|_| Ledger::default()).collect();
    let clients = ledgers.iter().enumerate();
    let load = Load::start(clients.map(|(id, ledger)| client(&postgres, id, ledger)).collect());
    // The default transaction touches four tables, paced so that the machine stays usable.
    let bench = postgres.spawn("pgbench", &["-n", "-c", "2", "-T", "100000", "-R", "150"]);

    let rounds = soak(4, 40);
    for round in 0..rounds {
        let until = load.written() + 20 + random.below(200);
        wait_until("the clients go on", PATIENCE, || {
            let written = load.written();
            if written >= until { Ok(()) } else { Err(postgres.log()) }
        });
        if round == rounds / 2 {
            lab.kill(Daemon::Replicate);
            lab.start(Daemon::Replicate);
        }
        let ordered = now();
        lab.cut();
        let point = hold_point(&mut lab, ordered);
        let copy = dir.path().join("copy.img");
        run("cp", &["--sparse=always", text(&point.replica), text(&copy)]);
        lab.start_target();
        check(&copy, dir.path(), &point, &ledgers);
        eprintln!("round {round}: epoch {} is whole", point.epoch);
        std::fs::remove_file(&copy).expect("remove the copy");
    }

    drop(bench);
    load.stop();
    lab.cli(Side::Site, &["unprotect", SERVER, "--yes"]).ok();
    drop(lab);
    postgres.stop_and_check();
    mount.unmount();
}

/// Inserts the next row of a client, and notes that it was acknowledged.
fn client(postgres: &Postgres, id: usize, ledger: &Ledger) -> Box<dyn FnMut() -> u64 + Send> {
    let mut connection = postgres.connect();
    let ledger = ledger.clone();
    let mut row = 0;
    Box::new(move || {
        row += 1;
        let insert = format!("INSERT INTO rows VALUES ({id}, {row}) RETURNING row;");
        let answer = connection.ask(&insert).expect("PostgreSQL goes on");
        assert_eq!(answer, row.to_string());
        ledger.lock().expect("no panic").push((now(), row));
        std::thread::sleep(Duration::from_millis(10));
        1
    })
}

/// An exact point that the replica volume holds while the target is stopped.
struct HeldPoint {
    epoch: u64,
    /// Time of its cut, nanoseconds since 1970.
    time: u64,
    replica: PathBuf,
}

/// Stops the target at a moment when the replica volume is a point cut after `ordered`.
fn hold_point(lab: &mut Lab, ordered: u64) -> HeldPoint {
    let replica = lab.status().expect("status").volumes[0].replica.clone().expect("a replica");
    let replica = PathBuf::from(replica);
    let record = || -> serde_json::Value {
        let text = std::fs::read(replica.with_file_name("state.json")).expect("state.json");
        serde_json::from_slice(&text).expect("JSON")
    };
    let time = |record: &serde_json::Value| record["base"]["time_ns"].as_u64().unwrap_or(0);
    loop {
        wait_until("an exact point cut after the order is in the replica volume", PATIENCE, || {
            let record = record();
            let done = time(&record) >= ordered && record["promoting"].is_null();
            if done { Ok(()) } else { Err(record.to_string()) }
        });
        lab.stop(Daemon::Target);
        let record = record();
        if record["promoting"].is_null() {
            assert_eq!(record["base"]["consistency"], "crash", "{record}");
            let epoch = record["base"]["epoch"].as_u64().expect("an epoch");
            return HeldPoint { epoch, time: time(&record), replica };
        }
        // It was caught between two points.
        lab.start_target();
    }
}

/// Starts PostgreSQL on a copy of the replica volume and looks at everything in it.
fn check(copy: &Path, dir: &Path, point: &HeldPoint, ledgers: &[Ledger]) {
    let device = LoopDevice::over(copy, false);
    let mount = Mount::new(device.path(), &dir.join("copy"), "defaults");
    let cluster = mount.path().join("cluster");
    // It names a process of the server, which would not run on another machine.
    std::fs::remove_file(cluster.join("postmaster.pid")).expect("it ran at the cut");
    let postgres = Postgres::start(&cluster, &dir.join("copy-socket"));
    assert!(postgres.log().contains("automatic recovery in progress"), "{}", postgres.log());
    for (id, ledger) in ledgers.iter().enumerate() {
        let ledger = ledger.lock().expect("no panic");
        let before = ledger.iter().take_while(|(at, _)| *at < point.time);
        let acknowledged = before.last().map_or(0, |(_, row)| *row);
        let found = postgres
            .sql(&format!("SELECT count(*), coalesce(max(row), 0) FROM rows WHERE client = {id}"));
        let (count, newest) = found.split_once('|').expect("two fields");
        let newest: u64 = newest.parse().expect("a number");
        assert!(
            newest >= acknowledged,
            "epoch {}: row {acknowledged} of client {id} was acknowledged before the cut, the \
             point ends at {newest}",
            point.epoch
        );
        assert_eq!(count, newest.to_string(), "epoch {}: client {id} lacks rows", point.epoch);
        eprintln!("  client {id}: {acknowledged} acknowledged before the cut, {newest} there");
    }
    let sums = postgres.sql(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM \
         pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches), (SELECT \
         coalesce(sum(delta), 0) FROM pgbench_history)",
    );
    let sums: Vec<&str> = sums.split('|').collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "a transaction is there in part: {sums:?}");
    postgres.tool("pg_amcheck", &["--heapallindexed"]);
    postgres.stop_and_check();
    mount.unmount();
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
