//! Both data planes in this process, over TLS on loopback, without control: for tests that want many
//! points, each at once.

use crate::wait_until;
use secondsite::source::{Source, SourceConfig};
use secondsite::target::retention::RetentionClock;
use secondsite::target::{Target, TargetConfig};
use secondsite_control::api::{
    AgentAssignment, KeepPolicy, Order, OrderKind, OrderResult, OrderState, TargetAssignment,
    TargetServer, TargetVolume, TrackerChoice, VolumeAssignment, VolumePhase,
};
use secondsite_control::ca::Authority;
use secondsite_control::clock::{Clock, SystemClock};
use secondsite_control::pki::{self, Identity, Role};
use secondsite_tracker::ebpf::Ebpf;
use secondsite_tracker::freeze::Freezer;
use secondsite_tracker::splice::Splicer;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const SERVER: &str = "11111111111111111111111111111111";
const MACHINE: [u8; 32] = [0x33; 32];
const BLOCK_BYTES: u32 = 4096;
const MEMORY_BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(180);

/// See the module.
pub struct InProcess {
    source: Option<Source>,
    target: Option<Target>,
    orders: u64,
    assignment: AgentAssignment,
    folder: PathBuf,
    filter_dir: PathBuf,
}

/// The id of a volume by its number.
pub fn volume_id(number: usize) -> String {
    format!("{:032x}", 0x22 + number)
}

impl InProcess {
    /// Protects these devices with this tracker; cuts are made when ordered, and at no other time.
    pub fn start(
        folder: &Path,
        devices: &[PathBuf],
        tracker: TrackerChoice,
        filter_dir: &Path,
    ) -> Self {
        Self::start_with(folder, devices, tracker, filter_dir, None)
    }

    /// The same with a reserve for the filter.
    pub fn start_with(
        folder: &Path,
        devices: &[PathBuf],
        tracker: TrackerChoice,
        filter_dir: &Path,
        reserve: Option<&Path>,
    ) -> Self {
        make_identities(folder);
        let assignment = target_assignment(devices, None);
        let target = start_target(folder, "127.0.0.1:0", assignment, Arc::default());
        let (address, target) = (target.listening(), Some(target));
        Self::start_source_of(folder, devices, tracker, filter_dir, reserve, address, target)
    }

    /// Protects these devices, with a target that somebody else runs.
    pub fn start_towards(
        folder: &Path,
        devices: &[PathBuf],
        tracker: TrackerChoice,
        target: SocketAddr,
    ) -> Self {
        Self::start_source_of(folder, devices, tracker, Path::new("/nowhere"), None, target, None)
    }

    fn start_source_of(
        folder: &Path,
        devices: &[PathBuf],
        tracker: TrackerChoice,
        filter_dir: &Path,
        reserve: Option<&Path>,
        address: SocketAddr,
        target: Option<Target>,
    ) -> Self {
        let volumes = devices.iter().enumerate().map(|(number, device)| VolumeAssignment {
            id: volume_id(number),
            name: format!("disk{number}"),
            path: device.to_str().expect("UTF-8").into(),
            size_bytes: size_of(device),
            tracker,
            block_bytes: BLOCK_BYTES,
            excluded: Vec::new(),
            reserve: reserve.map(|path| path.to_str().expect("UTF-8").into()),
        });
        let assignment = AgentAssignment {
            version: 1,
            server_id: SERVER.into(),
            server_name: "db1".into(),
            target: Some(address.to_string()),
            goal_seconds: 86_400,
            volumes: volumes.collect(),
        };
        let (folder, filter_dir) = (folder.to_path_buf(), filter_dir.to_path_buf());
        let source = None;
        let mut site = Self { source, target, orders: 0, assignment, folder, filter_dir };
        site.start_source();
        site
    }

    /// Starts the agent's side, or starts it anew.
    pub fn start_source(&mut self) {
        if let Some(source) = self.source.take() {
            source.stop();
        }
        let identity = Identity::load(&self.folder.join("agent"), "agent").expect("identity");
        let config = SourceConfig {
            identity: Arc::new(identity),
            machine: MACHINE,
            pin_dir: pins(),
            filter_dir: self.filter_dir.clone(),
            memory_bytes: MEMORY_BYTES,
            workers: 2,
            freezer: Freezer::start(&self.folder.join("notes")).expect("a freezer"),
            splicer: Splicer::start(&self.folder.join("splice")).ok(),
        };
        let source = Source::start(config, Box::new(|| {}));
        source.assign(self.assignment.clone());
        self.source = Some(source);
        self.orders = 0;
    }

    /// Ends the agent's side.
    pub fn stop_source(&mut self) {
        if let Some(source) = self.source.take() {
            source.stop();
        }
    }

    /// Bytes that the agent's side has sent since it was started.
    pub fn sent_bytes(&self) -> u64 {
        self.source().report().volumes.iter().map(|volume| volume.sent_bytes).sum()
    }

    fn source(&self) -> &Source {
        self.source.as_ref().expect("it runs")
    }

    /// Until every volume follows.
    pub fn follow(&self) {
        wait_until("every volume follows", PATIENCE, || {
            let volumes = self.source().report().volumes;
            let stopped = volumes.iter().find(|volume| volume.phase == VolumePhase::Stopped);
            assert!(stopped.is_none(), "{stopped:?}");
            let all = volumes.iter().all(|volume| volume.phase == VolumePhase::Following);
            if all { Ok(()) } else { Err(format!("{volumes:?}")) }
        });
    }

    /// An ordered cut; whether the point is exact, or why there is none.
    pub fn cut(&mut self) -> Result<bool, String> {
        self.cut_point().map(|(_, exact)| exact)
    }

    /// An ordered cut; the point's id, and whether it is exact, or why there is none.
    pub fn cut_point(&mut self) -> Result<(String, bool), String> {
        self.orders += 1;
        let (number, what) = (self.orders, OrderKind::Cut);
        self.source().order(Order { number, what });
        loop {
            match self.source().report().orders.get(&number) {
                Some(OrderState::Done { result: OrderResult::Cut { point, exact } }) => {
                    let point = point.clone();
                    let exact = *exact;
                    self.source().forget_orders(number);
                    return Ok((point, exact));
                }
                Some(OrderState::Failed { message, .. }) => return Err(message.clone()),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Epochs given up so far, over all volumes; compares; how the last cut was made.
    pub fn given_up(&self) -> u64 {
        self.source().observe().volumes.iter().map(|volume| volume.status.give_ups_total).sum()
    }

    /// Compares that a doubt made necessary.
    pub fn compares(&self) -> u64 {
        self.source().report().volumes.iter().map(|volume| volume.compares).sum()
    }

    /// The trackers in use.
    pub fn trackers(&self) -> Vec<String> {
        self.source().report().volumes.into_iter().map(|volume| volume.tracker).collect()
    }

    /// The replica volumes, once they are at the newest point; nothing changes them before the next
    /// cut.
    pub fn replicas(&self) -> Vec<PathBuf> {
        wait_until("the newest point is promoted", PATIENCE, || {
            let target = self.target.as_ref().expect("it runs");
            let volumes = target.report().volumes;
            let ready = volumes.iter().all(|v| v.epoch.is_some() && v.epoch == v.promoted_epoch);
            let paths = volumes.iter().map(|volume| PathBuf::from(&volume.replica)).collect();
            if ready { Ok(paths) } else { Err(format!("{volumes:?}")) }
        })
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        if let Some(source) = self.source.take() {
            source.stop();
        }
        if let Some(target) = self.target.take() {
            target.stop();
        }
        for volume in &self.assignment.volumes {
            // Pinned or not: the test is over.
            let _ = Ebpf::remove_pins(&pins().join(&volume.id));
        }
        let _ = std::fs::remove_dir(pins());
        let _ = std::fs::remove_dir("/sys/fs/bpf/secondsite");
    }
}

/// Where this process pins what follows its volumes.
fn pins() -> PathBuf {
    format!("/sys/fs/bpf/secondsite/test-{}", std::process::id()).into()
}

/// Certificates of both sides, in their folders.
pub fn make_identities(folder: &Path) {
    let authority = Authority::create(&folder.join("ca"), &SystemClock).expect("a CA");
    for (name, role) in
        [("agent", Role::Agent(SERVER.into())), ("target", Role::Target("4".repeat(32)))]
    {
        let (key, request) = pki::new_request().expect("a key");
        let issued = authority.sign(&request, &role, &[], SystemClock.now()).expect("signed");
        let root = authority.certificate_pem();
        let dir = folder.join(name);
        pki::install(&dir, name, &key, &issued.certificate_pem, root).expect("installed");
    }
}

/// What a target is told of these devices.
pub fn target_assignment(devices: &[PathBuf], keep: Option<KeepPolicy>) -> TargetAssignment {
    let volumes = devices.iter().enumerate().map(|(number, device)| TargetVolume {
        id: volume_id(number),
        name: format!("disk{number}"),
        size_bytes: size_of(device),
        block_bytes: BLOCK_BYTES,
    });
    let server = TargetServer {
        id: SERVER.into(),
        name: "db1".into(),
        machine: MACHINE.iter().map(|byte| format!("{byte:02x}")).collect(),
        keep,
        active: true,
        volumes: volumes.collect(),
    };
    TargetAssignment { version: 1, servers: vec![server] }
}

/// A target in this process, in the folder `store`.
pub fn start_target(
    folder: &Path,
    listen: &str,
    assignment: TargetAssignment,
    clock: Arc<RetentionClock>,
) -> Target {
    let config = TargetConfig {
        identity: Arc::new(Identity::load(&folder.join("target"), "target").expect("identity")),
        store: folder.join("store"),
        listen: listen.parse().expect("an address"),
        devices: Vec::new(),
        reserve_bytes: 0,
        memory_bytes: MEMORY_BYTES,
        nbd_socket: folder.join("nbd.sock"),
        scratch_bytes: 1 << 30,
        clock,
    };
    Target::start(config, assignment, Box::new(|| {})).expect("a target")
}

fn size_of(device: &Path) -> u64 {
    let mut file = File::open(device).unwrap_or_else(|e| panic!("{}: {e}", device.display()));
    file.seek(SeekFrom::End(0)).expect("its size")
}
