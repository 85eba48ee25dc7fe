//! Source and target over a real loop device with ext4, eBPF, and TLS on loopback: the replica is
//! compared byte by byte. Needs root, BTF and loop devices.

use secondsite::source::{Source, SourceConfig};
use secondsite::target::{Target, TargetConfig};
use secondsite_control::api::{
    AgentAssignment, Order, OrderKind, OrderResult, OrderState, TargetAssignment, TargetServer,
    TargetVolume, TrackerChoice, VolumeAssignment, VolumePhase,
};
use secondsite_control::ca::Authority;
use secondsite_control::clock::{Clock, SystemClock};
use secondsite_control::pki::{self, Identity, Role};
use secondsite_tracker::freeze::Freezer;
use std::fs::File;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SERVER: &str = "11111111111111111111111111111111";
const VOLUME: &str = "22222222222222222222222222222222";
const MACHINE: [u8; 32] = [0x33; 32];
const BYTES: u64 = 256 << 20;

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().expect(program);
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_string()
}

/// A mounted loop device; gone when dropped.
struct Mounted {
    device: PathBuf,
    mount: PathBuf,
}

impl Mounted {
    fn new(folder: &Path) -> Self {
        let file = folder.join("disk");
        File::create(&file).unwrap().set_len(BYTES).unwrap();
        let device = PathBuf::from(run("losetup", &["-f", "--show", file.to_str().unwrap()]));
        let mount = folder.join("mnt");
        std::fs::create_dir(&mount).unwrap();
        let mounted = Self { device, mount };
        run("mkfs.ext4", &["-q", "-F", mounted.device.to_str().unwrap()]);
        run("mount", &[mounted.device.to_str().unwrap(), mounted.mount.to_str().unwrap()]);
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mount).status();
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = secondsite_tracker::ebpf::Ebpf::remove_pins(&self.0.join(VOLUME));
        let _ = std::fs::remove_dir(&self.0);
        let _ = std::fs::remove_dir("/sys/fs/bpf/secondsite");
    }
}

fn identity(folder: &Path, authority: &Authority, name: &str, role: &Role) -> Arc<Identity> {
    let (key, request) = pki::new_request().unwrap();
    let issued = authority.sign(&request, role, &[], SystemClock.now()).unwrap();
    let dir = folder.join(name);
    pki::install(&dir, name, &key, &issued.certificate_pem, authority.certificate_pem()).unwrap();
    Arc::new(Identity::load(&dir, name).unwrap())
}

struct Site {
    folder: PathBuf,
    authority: Authority,
    pins: PathBuf,
    device: PathBuf,
    tracker: TrackerChoice,
}

impl Site {
    fn target(&self, listen: SocketAddr) -> Target {
        let config = TargetConfig {
            identity: identity(
                &self.folder,
                &self.authority,
                "target",
                &Role::Target("4".repeat(32)),
            ),
            store: self.folder.join("store"),
            listen,
            devices: Vec::new(),
            reserve_bytes: 0,
            memory_bytes: 64 << 20,
        };
        let volumes = vec![TargetVolume {
            id: VOLUME.into(),
            name: "disk".into(),
            size_bytes: BYTES,
            block_bytes: 4096,
        }];
        let server = TargetServer {
            id: SERVER.into(),
            name: "db1".into(),
            machine: MACHINE.iter().map(|byte| format!("{byte:02x}")).collect(),
            keep: None,
            active: true,
            volumes,
        };
        let assignment = TargetAssignment { version: 1, servers: vec![server] };
        Target::start(config, assignment, Box::new(|| {})).unwrap()
    }

    fn source(&self, target: SocketAddr) -> Source {
        let config = SourceConfig {
            identity: identity(&self.folder, &self.authority, "agent", &Role::Agent(SERVER.into())),
            machine: MACHINE,
            pin_dir: self.pins.clone(),
            filter_dir: self.folder.join("filter"),
            memory_bytes: 64 << 20,
            workers: 2,
            freezer: Freezer::start(&self.folder.join("notes")).unwrap(),
            splicer: None,
        };
        let source = Source::start(config, Box::new(|| {}));
        let volume = VolumeAssignment {
            id: VOLUME.into(),
            name: "disk".into(),
            path: self.device.to_str().unwrap().into(),
            size_bytes: BYTES,
            tracker: self.tracker,
            block_bytes: 4096,
            excluded: Vec::new(),
            reserve: None,
        };
        source.assign(AgentAssignment {
            version: 1,
            server_id: SERVER.into(),
            server_name: "db1".into(),
            target: Some(target.to_string()),
            goal_seconds: 3,
            volumes: vec![volume],
        });
        source
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    // A loaded machine freezes slowly, and then seldom.
    let end = Instant::now() + Duration::from_secs(300);
    while Instant::now() < end {
        if let Some(found) = look() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("waited too long for {what}");
}

fn ordered(source: &Source, number: u64, what: OrderKind) -> OrderState {
    let begun = Instant::now();
    source.order(Order { number, what });
    let state = until("the order", || {
        let report = source.report();
        let state = report.orders[&number].clone();
        (!matches!(state, OrderState::Running { .. })).then_some(state)
    });
    println!("{what:?} in {:?}: {state:?}", begun.elapsed());
    state
}

fn phase(source: &Source, wanted: VolumePhase) {
    until("a phase", || {
        let row = source.report().volumes[0].clone();
        assert!(row.phase != VolumePhase::Stopped, "{row:?}");
        (row.phase == wanted).then_some(())
    });
}

/// The volume, mounted read-only by now, against the replica.
fn check_equal(site: &Site, target: &Target, after: Option<u64>) {
    let replica = until("the promotion", || {
        let row = target.report().volumes[0].clone();
        assert_eq!(row.error, None);
        (row.epoch > after && row.epoch == row.promoted_epoch).then_some(row.replica)
    });
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    // What lies under the loop device: its own page cache has what ext4 has not written.
    let mut disk = File::open(site.folder.join("disk")).unwrap();
    let mut replica = File::open(replica).unwrap();
    for at in 0..BYTES >> 20 {
        disk.read_exact(&mut ours).unwrap();
        replica.read_exact(&mut theirs).unwrap();
        assert!(ours == theirs, "MiB {at} differs");
    }
}

/// Writes files, with pauses or without a moment's rest.
fn writer(
    mount: PathBuf,
    stop: Arc<AtomicBool>,
    restless: Arc<AtomicBool>,
) -> std::thread::JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut count = 0u64;
        while !stop.load(Ordering::Relaxed) {
            let path = mount.join(format!("file{}", count % 40));
            let mut file = File::create(path).unwrap();
            let bytes = vec![count as u8; 4096 * (1 + (count * 7 % 60) as usize)];
            file.write_all(&bytes).unwrap();
            let restless = restless.load(Ordering::Relaxed);
            if restless || count.is_multiple_of(3) {
                file.sync_all().unwrap();
            }
            count += 1;
            if !restless {
                std::thread::sleep(Duration::from_millis(3));
            }
        }
        count
    })
}

fn site(folder: &Path, name: &str, device: &Path, tracker: TrackerChoice) -> (Site, Pins) {
    let pins: PathBuf = format!("/sys/fs/bpf/secondsite/{name}-{}", std::process::id()).into();
    let authority = Authority::create(&folder.join("ca"), &SystemClock).unwrap();
    let site = Site {
        folder: folder.into(),
        authority,
        pins: pins.clone(),
        device: device.into(),
        tracker,
    };
    (site, Pins(pins))
}

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("source-").tempdir_in("/tmp").unwrap()
}

#[test]
fn a_busy_ext4_is_replicated_exactly_through_restarts_of_both_sides() {
    let _ = tracing_subscriber::fmt().with_env_filter("secondsite=info").try_init();
    let folder = folder();
    let mounted = Mounted::new(folder.path());
    let (site, _pins) = site(folder.path(), "source-test", &mounted.device, TrackerChoice::Ebpf);
    let stop = Arc::new(AtomicBool::new(false));
    let restless = Arc::new(AtomicBool::new(false));
    let writing = writer(mounted.mount.clone(), stop.clone(), restless.clone());

    let mut target = site.target("127.0.0.1:0".parse().unwrap());
    let address = target.listening();
    let mut source = site.source(address);
    phase(&source, VolumePhase::Following);
    let OrderState::Done { result: OrderResult::Cut { exact: true, .. } } =
        ordered(&source, 1, OrderKind::Cut)
    else {
        panic!("an exact point under load")
    };
    println!("under load: {:?}", source.report().volumes[0]);

    restless.store(true, Ordering::Relaxed);
    let mut last = String::new();
    until("a cut by freeze", || {
        let row = source.report().volumes[0].clone();
        if row.reason != last {
            last = row.reason;
            println!("{}: {last}", row.cut);
        }
        (row.cut == "freeze").then_some(())
    });
    println!("under more: {:?}", source.report().volumes[0]);
    restless.store(false, Ordering::Relaxed);

    source.stop();
    std::thread::sleep(Duration::from_millis(500));
    source = site.source(address);
    phase(&source, VolumePhase::Following);
    let compares = source.report().volumes[0].compares;
    target.stop();
    std::thread::sleep(Duration::from_millis(300));
    target = site.target(address);
    ordered(&source, 1, OrderKind::Cut);
    source.set_identity(identity(
        &site.folder,
        &site.authority,
        "renewed",
        &Role::Agent(SERVER.into()),
    ));
    let renewed = ordered(&source, 2, OrderKind::Cut);
    assert!(matches!(renewed, OrderState::Done { .. }), "with a renewed certificate: {renewed:?}");
    ordered(&source, 3, OrderKind::Verify);

    stop.store(true, Ordering::Relaxed);
    println!("{} files written", writing.join().unwrap());
    run("mount", &["-o", "remount,ro", mounted.mount.to_str().unwrap()]);
    let before = target.report().volumes[0].epoch;
    let OrderState::Done { result: OrderResult::Cut { exact: true, .. } } =
        ordered(&source, 4, OrderKind::Cut)
    else {
        panic!("an exact point")
    };
    check_equal(&site, &target, before);
    let OrderState::Done { result: OrderResult::Verify { volumes } } =
        ordered(&source, 5, OrderKind::Verify)
    else {
        panic!("a verify")
    };
    assert_eq!((volumes[0].compared_bytes, volumes[0].differing_bytes), (BYTES, 0));
    println!("compares after the restart: {compares}; {:?}", source.report().volumes[0]);
    let ended = Instant::now();
    source.stop();
    println!("stopped in {:?}", ended.elapsed());
    target.stop();
}

#[test]
fn a_compare_only_volume_is_replicated() {
    let folder = folder();
    let mounted = Mounted::new(folder.path());
    let (site, _pins) =
        site(folder.path(), "compare-test", &mounted.device, TrackerChoice::Compare);
    let target = site.target("127.0.0.1:0".parse().unwrap());
    let source = site.source(target.listening());
    phase(&source, VolumePhase::Following);
    std::fs::write(mounted.mount.join("late"), vec![7; 3 << 20]).unwrap();
    run("mount", &["-o", "remount,ro", mounted.mount.to_str().unwrap()]);
    let before = target.report().volumes[0].epoch;
    let OrderState::Done { result: OrderResult::Cut { exact: false, .. } } =
        ordered(&source, 1, OrderKind::Cut)
    else {
        panic!("a fuzzy point")
    };
    check_equal(&site, &target, before);
    source.stop();
    target.stop();
}

#[test]
fn what_cannot_be_read_is_named_and_everything_else_goes_on() {
    let folder = folder();
    let mounted = Mounted::new(folder.path());
    std::fs::write(mounted.mount.join("early"), vec![7; 3 << 20]).unwrap();
    run("mount", &["-o", "remount,ro", mounted.mount.to_str().unwrap()]);
    // Reading beyond the end of what lies under a loop device is an I/O error.
    let (whole, rest) = (BYTES - (2 << 20) - 8192, (2 << 20) + 8192);
    File::options().write(true).open(folder.path().join("disk")).unwrap().set_len(whole).unwrap();
    let (site, _pins) = site(folder.path(), "bad-test", &mounted.device, TrackerChoice::Ebpf);
    let target = site.target("127.0.0.1:0".parse().unwrap());
    let source = site.source(target.listening());
    let row = until("the range to be named", || {
        let row = source.report().volumes[0].clone();
        row.reason.contains("cannot be read").then_some(row)
    });
    assert!(row.reason.contains(&format!("at byte {whole} ({rest} bytes)")), "{row:?}");
    assert_eq!((row.phase, row.backlog_bytes), (VolumePhase::Following, rest));
    let point = until("a point", || target.report().points.last().cloned());
    assert_eq!(point.consistency, "fuzzy");
    source.stop();
    target.stop();
}

#[test]
fn unprotecting_removes_the_pins() {
    let folder = folder();
    let mounted = Mounted::new(folder.path());
    let (site, pins) = site(folder.path(), "unprotect-test", &mounted.device, TrackerChoice::Auto);
    let source = site.source("127.0.0.1:1".parse().unwrap());
    let pinned = pins.0.join(VOLUME);
    until("the pins", || pinned.exists().then_some(()));
    source.assign(AgentAssignment {
        version: 2,
        server_id: SERVER.into(),
        server_name: "db1".into(),
        target: None,
        goal_seconds: 3,
        volumes: Vec::new(),
    });
    until("the pins to go", || (!pinned.exists()).then_some(()));
    assert!(source.report().volumes.is_empty());
    source.stop();
}
