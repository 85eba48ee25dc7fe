//! A source in this process and a target in a child, over TLS on loopback, without control: the
//! data path alone, so that nothing but copying is timed.
//!
//! Two processes, because each one's memory is a figure of its own.

use anyhow::{Context, Result, bail, ensure};
use secondsite::source::{Source, SourceConfig};
use secondsite::target::{Target, TargetConfig};
use secondsite_control::api::{
    AgentAssignment, Order, OrderKind, OrderState, TargetAssignment, TargetServer, TargetVolume,
    TrackerChoice, VolumeAssignment, VolumePhase, VolumeReport,
};
use secondsite_control::ca::Authority;
use secondsite_control::clock::{Clock, SystemClock};
use secondsite_control::pki::{self, Identity, Role};
use secondsite_tracker::ebpf::Ebpf;
use secondsite_tracker::freeze::Freezer;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SERVER: &str = "11111111111111111111111111111111";
const VOLUME: &str = "22222222222222222222222222222222";
const MACHINE: [u8; 32] = [0x33; 32];
const BLOCK_BYTES: u32 = 4096;
/// The daemons' own default (`memory` in agent.toml and target.toml).
const MEMORY_BYTES: u64 = 64 << 20;
/// Nothing that is measured takes longer.
const LIMIT: Duration = Duration::from_secs(1800);
/// Between two looks at the source's report.
const POLL: Duration = Duration::from_millis(5);

/// One protected volume.
pub struct Deployment {
    source: Option<Source>,
    target: Child,
    pins: PathBuf,
    orders: u64,
}

/// What a process has cost so far.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Processor time, seconds.
    pub cpu_seconds: f64,
    /// Largest resident memory, bytes, without what files have in the page cache.
    pub resident_bytes_max: u64,
}

impl Deployment {
    /// Starts both ends with their state in `folder` and begins the first copy of `device`.
    pub fn start(folder: &Path, device: &Path, bytes: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let authority = Authority::create(&folder.join("ca"), &SystemClock)?;
        for (name, role) in
            [("agent", Role::Agent(SERVER.into())), ("target", Role::Target("4".repeat(32)))]
        {
            let (key, request) = pki::new_request()?;
            let issued = authority.sign(&request, &role, &[], SystemClock.now())?;
            let root = authority.certificate_pem();
            pki::install(&folder.join(name), name, &key, &issued.certificate_pem, root)?;
        }
        let mut target = Command::new(std::env::current_exe()?)
            .arg("serve-target")
            .arg(folder)
            .arg(bytes.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut address = String::new();
        BufReader::new(target.stdout.take().context("its stdout")?).read_line(&mut address)?;
        let pins: PathBuf = format!("/sys/fs/bpf/secondsite/bench-{}", std::process::id()).into();
        let config = SourceConfig {
            identity: Arc::new(Identity::load(&folder.join("agent"), "agent")?),
            machine: MACHINE,
            pin_dir: pins.clone(),
            filter_dir: folder.join("filter"),
            memory_bytes: MEMORY_BYTES,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            freezer: Freezer::start(&folder.join("notes"))?,
            splicer: None,
        };
        let source = Source::start(config, Box::new(|| {}));
        let volume = VolumeAssignment {
            id: VOLUME.into(),
            name: "bench".into(),
            path: device.to_str().context("a device path in UTF-8")?.into(),
            size_bytes: bytes,
            tracker: TrackerChoice::Ebpf,
            block_bytes: BLOCK_BYTES,
            excluded: Vec::new(),
            reserve: None,
        };
        source.assign(AgentAssignment {
            version: 1,
            server_id: SERVER.into(),
            server_name: "bench".into(),
            target: Some(address.trim().to_owned()),
            // Cuts are ordered here; none of its own falls into a measurement.
            goal_seconds: 86_400,
            volumes: vec![volume],
        });
        Ok(Self { source: Some(source), target, pins, orders: 0 })
    }

    /// Waits until the first copy is durable on the target; from [`Self::start`].
    pub fn copied(&self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let report = self.report()?;
            match report.phase {
                VolumePhase::Following => return Ok(()),
                VolumePhase::Stopped => bail!("the volume stopped: {}", report.reason),
                _ => ensure!(Instant::now() < end, "no end of the first copy: {report:?}"),
            }
            std::thread::sleep(POLL);
        }
    }

    /// Orders a cut and waits until it is committed on the target.
    pub fn cut(&mut self) -> Result<()> {
        self.orders += 1;
        let number = self.orders;
        let source = self.source.as_ref().context("the source runs")?;
        source.order(Order { number, what: OrderKind::Cut });
        let end = Instant::now() + LIMIT;
        loop {
            match source.report().orders.get(&number) {
                Some(OrderState::Done { .. }) => return Ok(()),
                Some(OrderState::Failed { message, .. }) => bail!("the cut failed: {message}"),
                state => ensure!(Instant::now() < end, "no end of the cut: {state:?}"),
            }
            std::thread::sleep(POLL);
        }
    }

    /// The volume as the source reports it.
    pub fn report(&self) -> Result<VolumeReport> {
        let report = self.source.as_ref().context("the source runs")?.report();
        report.volumes.into_iter().next().context("one volume")
    }

    /// What the target's process has cost.
    pub fn target_cost(&self) -> Result<Cost> {
        cost(&self.target.id().to_string())
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if let Some(source) = self.source.take() {
            source.stop();
        }
        // Its end of input is what it ends by.
        drop(self.target.stdin.take());
        let _ = self.target.wait();
        let _ = Ebpf::remove_pins(&self.pins.join(VOLUME));
        let _ = std::fs::remove_dir(&self.pins);
    }
}

/// What the process `pid` (or `self`) has cost.
pub fn cost(pid: &str) -> Result<Cost> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |key: &str| -> Result<u64> {
        let line = status.lines().find(|line| line.starts_with(key)).context("proc status")?;
        Ok(line.split_whitespace().nth(1).context("a value")?.parse()?)
    };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold blanks; what follows it does not.
    let fields: Vec<&str> =
        stat.rsplit(") ").next().context("proc stat")?.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // Linux shows processor time in hundredths of a second on every architecture we run on.
    Ok(Cost { cpu_seconds: ticks as f64 / 100.0, resident_bytes_max: kib("VmHWM")? << 10 })
}

/// The child's whole life: serves one volume until its input ends.
pub fn serve_target(folder: &Path, bytes: u64) -> Result<()> {
    let config = TargetConfig {
        identity: Arc::new(Identity::load(&folder.join("target"), "target")?),
        store: folder.join("store"),
        listen: "127.0.0.1:0".parse()?,
        devices: Vec::new(),
        reserve_bytes: 0,
        memory_bytes: MEMORY_BYTES,
    };
    let volume = TargetVolume {
        id: VOLUME.into(),
        name: "bench".into(),
        size_bytes: bytes,
        block_bytes: BLOCK_BYTES,
    };
    let server = TargetServer {
        id: SERVER.into(),
        name: "bench".into(),
        machine: MACHINE.iter().map(|byte| format!("{byte:02x}")).collect(),
        keep: None,
        active: true,
        volumes: vec![volume],
    };
    let assignment = TargetAssignment { version: 1, servers: vec![server] };
    let target = Target::start(config, assignment, Box::new(|| {}))?;
    println!("{}", target.listening());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    target.stop();
    Ok(())
}
