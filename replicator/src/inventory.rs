//! The block devices of this host that could be protected, as the agent offers them to control.
//!
//! `lsblk` names whole disks, partitions, logical volumes and attached loop devices; this module
//! adds what each is used by, where swap lies on a whole disk, on which protectable device it lies,
//! and how it could be tracked. Control may choose only among these, and an allow list narrows them.
//!
//! Both read from the devices, and a read from one that does not answer cannot be interrupted: the
//! look is bounded from outside ([`bounded`]), and what it waits for is named.

use crate::filter::client::{Client, Listed};
use secondsite_control::api::InventoryDevice;
use secondsite_tracker::device::Device;
use secondsite_tracker::ebpf::Ebpf;
use secondsite_tracker::splice;
use serde::Deserialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// What is asked of `lsblk`.
const COLUMNS: &str = "NAME,KNAME,PATH,TYPE,SIZE,MOUNTPOINTS,FSTYPE";
/// Unit of `/sys/class/block/X/start`, whatever the device's own block size.
const SYSFS_SECTOR_BYTES: u64 = 512;

/// How long all devices together may take to answer.
const LIMIT: Duration = Duration::from_secs(15);

/// Why there is no inventory.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// `lsblk` could not be run, or failed.
    #[error("lsblk: {0}")]
    Run(String),
    /// `lsblk` printed what cannot be read.
    #[error("lsblk printed what cannot be read: {0}")]
    Parse(#[from] serde_json::Error),
    /// A device does not answer.
    #[error(
        "{} does not answer (waited for {} s), so that the block devices of this host cannot be \
         listed; what is replicated already goes on, new devices are offered when it answers",
        .0, LIMIT.as_secs()
    )]
    Stalled(String),
}

/// How long a filter may take to answer.
const FILTER_LIMIT: Duration = Duration::from_secs(2);

/// What the one look that is under way waits for.
static WAITS_FOR: Mutex<Option<WaitsFor>> = Mutex::new(None);

enum WaitsFor {
    /// `lsblk`, with this process id.
    Lsblk(u32),
    /// A device.
    Device(PathBuf),
}

/// Takes the inventory of this host. `allow`: the only devices to offer; empty for all. `filter`:
/// the folder of the filter, if one runs.
pub fn take(allow: &[PathBuf], filter: &Path) -> Result<Vec<InventoryDevice>, InventoryError> {
    let (allow, filter) = (allow.to_vec(), filter.to_path_buf());
    bounded(&WAITS_FOR, LIMIT, move || look(&allow, &filter)).map_err(InventoryError::Stalled)?
}

/// Runs `look` in a thread of its own. One that does not come back within `limit` is left to
/// itself, and nobody looks again before it has ended. Fails with what it waits for.
fn bounded<T: Send + 'static>(
    waits_for: &'static Mutex<Option<WaitsFor>>,
    limit: Duration,
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    /// However the look ends, the next one may begin.
    struct Ends(&'static Mutex<Option<WaitsFor>>);
    impl Drop for Ends {
        fn drop(&mut self) {
            *lock(self.0) = None;
        }
    }
    let stalled = || lock(waits_for).as_ref().map_or("a block device".into(), WaitsFor::name);
    {
        let mut begins = lock(waits_for);
        if begins.is_some() {
            drop(begins);
            return Err(stalled());
        }
        *begins = Some(WaitsFor::Device("lsblk".into()));
    }
    let ends = Ends(waits_for);
    let (found, answer) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("inventory".into()).spawn(move || {
        let found = found;
        let ends = ends; // goes before `found` does: who is answered may look again
        let result = look();
        drop(ends);
        // Nobody listens any more if it took too long.
        let _ = found.send(result);
    });
    thread.map_err(|error| format!("a thread ({error})"))?;
    answer.recv_timeout(limit).map_err(|_| stalled())
}

fn lock(waits_for: &Mutex<Option<WaitsFor>>) -> std::sync::MutexGuard<'_, Option<WaitsFor>> {
    waits_for.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl WaitsFor {
    fn name(&self) -> String {
        let pid = match self {
            Self::Device(path) => return path.display().to_string(),
            Self::Lsblk(pid) => pid,
        };
        // The device that it has open.
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        let device =
            targets.find(|path| path.starts_with("/dev") && path != Path::new("/dev/null"));
        device.map_or(format!("lsblk (process {pid})"), |path| path.display().to_string())
    }
}

fn look(allow: &[PathBuf], filter: &Path) -> Result<Vec<InventoryDevice>, InventoryError> {
    let failed = |error: std::io::Error| InventoryError::Run(error.to_string());
    let lsblk = Command::new("lsblk")
        .args(["--json", "--bytes", "--output", COLUMNS])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    *lock(&WAITS_FOR) = Some(WaitsFor::Lsblk(lsblk.id()));
    let output = lsblk.wait_with_output().map_err(failed)?;
    // With no block device at all it prints an empty document and fails.
    if !output.status.success() && output.stdout.is_empty() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(InventoryError::Run(text));
    }
    let filter = Client::connect(filter, FILTER_LIMIT).and_then(|client| client.list());
    let filter = filter.map_err(|error| error.to_string());
    let mut devices = read(&output.stdout, &Host { ebpf: Ebpf::supported(), filter })?;
    devices.retain(|device| allows(allow, Path::new(&device.path)));
    Ok(devices)
}

/// Whether an allow list (empty: everything) admits a device; links are followed on both sides.
pub fn allows(allow: &[PathBuf], device: &Path) -> bool {
    let resolve = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    allow.is_empty() || allow.iter().any(|path| resolve(path) == resolve(device))
}

/// What is asked of the host besides `lsblk`.
#[doc(hidden)]
pub trait Facts {
    /// Whether the device could be a volume; else why not, and which to choose instead.
    fn volume(&self, path: &Path) -> Result<(), String>;
    /// Whether eBPF runs here; else why not.
    fn ebpf(&self) -> Result<(), String>;
    /// Whether a filter runs here; else why not.
    fn filter(&self) -> Result<(), String>;
    /// The volume whose filter this device is, or what that serves from.
    fn filter_of(&self, path: &Path) -> Option<String>;
    /// Where a partition starts on its disk, bytes.
    fn start_bytes(&self, kname: &str) -> Option<u64>;
    /// Whether a swap area is on it. `lsblk` knows file systems only where udev runs.
    fn swap(&self, path: &Path) -> bool;
    /// The file behind a loop device.
    fn backing(&self, kname: &str) -> Option<String>;
}

struct Host {
    ebpf: Result<(), String>,
    filter: Result<Vec<Listed>, String>,
}

impl Facts for Host {
    fn volume(&self, path: &Path) -> Result<(), String> {
        *lock(&WAITS_FOR) = Some(WaitsFor::Device(path.to_path_buf()));
        Device::open(path).map(drop).map_err(|error| error.cause)
    }

    fn ebpf(&self) -> Result<(), String> {
        self.ebpf.clone()
    }

    fn filter(&self) -> Result<(), String> {
        self.filter.as_ref().map(drop).map_err(String::clone)
    }

    fn filter_of(&self, path: &Path) -> Option<String> {
        let listed = self.filter.iter().flatten();
        let ours = |listed: &&Listed| {
            let below = listed.backing.file_name().is_some_and(splice::is_below);
            listed.device.as_deref() == Some(path) || below && listed.backing == path
        };
        listed.filter(ours).map(|listed| listed.name.clone()).next()
    }

    fn start_bytes(&self, kname: &str) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/sys/class/block/{kname}/start")).ok()?;
        text.trim().parse::<u64>().ok()?.checked_mul(SYSFS_SECTOR_BYTES)
    }

    fn swap(&self, path: &Path) -> bool {
        *lock(&WAITS_FOR) = Some(WaitsFor::Device(path.to_path_buf()));
        // By another process: one that has a device open which does not answer cannot be ended.
        let probe = Command::new("blkid")
            .args(["--probe", "--match-tag", "TYPE", "--output", "value"])
            .arg(path)
            .stdin(Stdio::null())
            .output();
        probe.is_ok_and(|output| output.stdout.trim_ascii() == b"swap")
    }

    fn backing(&self, kname: &str) -> Option<String> {
        let path = format!("/sys/block/{kname}/loop/backing_file");
        std::fs::read_to_string(path).ok().map(|text| text.trim().to_string())
    }
}

#[derive(Deserialize)]
struct Document {
    blockdevices: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    name: String,
    kname: String,
    path: String,
    #[serde(rename = "type")]
    kind: String,
    /// Null for a device without a medium.
    size: Option<u64>,
    #[serde(default)]
    mountpoints: Vec<Option<String>>,
    fstype: Option<String>,
    #[serde(default)]
    children: Vec<Node>,
}

impl Node {
    fn mounts(&self) -> impl Iterator<Item = &str> {
        self.mountpoints.iter().flatten().map(String::as_str)
    }

    /// Swap in use, or a swap area that nothing else uses. A stale signature under a file system
    /// or a volume group must not exclude live data.
    fn is_swap(&self, facts: &dyn Facts) -> bool {
        if self.mounts().any(|mount| mount == "[SWAP]") {
            return true;
        }
        let idle = self.mounts().next().is_none() && self.children.is_empty();
        let signature = match self.fstype.as_deref() {
            Some(kind) => kind == "swap",
            None => facts.swap(Path::new(&self.path)),
        };
        idle && signature
    }
}

/// Reads what `lsblk` printed.
#[doc(hidden)]
pub fn read(json: &[u8], facts: &dyn Facts) -> Result<Vec<InventoryDevice>, InventoryError> {
    let json: &[u8] = if json.trim_ascii().is_empty() { b"{\"blockdevices\":[]}" } else { json };
    let document: Document = serde_json::from_slice(json)?;
    let mut list = List { facts, seen: HashSet::new(), devices: Vec::new() };
    for node in &document.blockdevices {
        list.add(node, "");
    }
    Ok(list.devices)
}

struct List<'a> {
    facts: &'a dyn Facts,
    /// A device over several others stands below each of them.
    seen: HashSet<String>,
    devices: Vec<InventoryDevice>,
}

impl List<'_> {
    /// `parent`: the topmost device below this one that can be a volume; empty if none can.
    fn add(&mut self, node: &Node, parent: &str) {
        let size_bytes = node.size.unwrap_or(0);
        // Memory disks and media that are not there hold nothing to protect.
        if node.kind == "rom" || size_bytes == 0 || node.kname.starts_with("ram") {
            return;
        }
        if !self.seen.insert(node.kname.clone()) {
            return;
        }
        let name = display_name(node);
        let (trackers, refused) = self.trackers(node);
        let own = if parent.is_empty() && !trackers.is_empty() { name.as_str() } else { parent };
        let swap = if node.kind == "part" { Vec::new() } else { self.swap_parts(node) };
        self.devices.push(InventoryDevice {
            name: name.clone(),
            path: node.path.clone(),
            kind: node.kind.clone(),
            size_bytes,
            used_by: self.used_by(node),
            swap,
            parent: parent.to_string(),
            trackers,
            refused,
        });
        for child in &node.children {
            self.add(child, own);
        }
    }

    fn trackers(&self, node: &Node) -> (Vec<String>, String) {
        if let Some(volume) = self.facts.filter_of(Path::new(&node.path)) {
            return (
                Vec::new(),
                format!("it belongs to the filter of {volume}: choose that volume"),
            );
        }
        if let Err(why) = self.facts.volume(Path::new(&node.path)) {
            return (Vec::new(), why);
        }
        let ebpf = match node.kind.as_str() {
            "disk" | "part" | "loop" => self.facts.ebpf(),
            kind => Err(format!(
                "eBPF follows whole disks and partitions, not {kind}: choose the disk below it"
            )),
        };
        // The filter goes under a volume of device-mapper that is in use; in front of another
        // device, its users have to open another one: only on request.
        let spliced = matches!(node.kind.as_str(), "lvm" | "crypt" | "dm")
            && !node.mountpoints.iter().flatten().any(|mount| mount == "/");
        let filter = self.facts.filter();
        let offered = [
            (spliced && filter.is_ok(), "ublk"),
            (ebpf.is_ok(), "ebpf"),
            (!spliced && filter.is_ok(), "ublk"),
            (true, "compare"),
        ];
        let trackers: Vec<String> = offered
            .into_iter()
            .filter(|(offered, _)| *offered)
            .map(|(_, name)| name.into())
            .collect();
        let why = match (trackers[0].as_str(), ebpf, filter) {
            ("compare", Err(ebpf), Err(filter)) if spliced => format!("{ebpf}; {filter}"),
            ("compare", Err(why), _) => why,
            _ => String::new(),
        };
        (trackers, why)
    }

    /// Swap partitions: name, offset and length on the whole device.
    fn swap_parts(&self, node: &Node) -> Vec<(String, u64, u64)> {
        let parts = node.children.iter().filter(|child| child.kind == "part");
        let swaps = parts.filter(|part| part.is_swap(self.facts));
        swaps
            .filter_map(|part| {
                let start = self.facts.start_bytes(&part.kname)?;
                Some((part.name.clone(), start, part.size?))
            })
            .collect()
    }

    fn used_by(&self, node: &Node) -> String {
        let mut uses = Uses::default();
        uses.gather(node, self.facts);
        uses.mounts.dedup();
        let mut text = uses.mounts.join(" ");
        for (there, word) in [(uses.swap, "swap"), (uses.lvm, "lvm"), (uses.raid, "raid")] {
            if there {
                text += if text.is_empty() { "" } else { ", " };
                text += word;
            }
        }
        if let Some(file) = self.facts.backing(&node.kname).filter(|_| node.kind == "loop") {
            text = if text.is_empty() {
                format!("file {file}")
            } else {
                format!("{text} (file {file})")
            };
        }
        if node.kind == "lvm" && !text.is_empty() { format!("lvm: {text}") } else { text }
    }
}

/// What a device and all that lies on it are used by.
#[derive(Default)]
struct Uses {
    mounts: Vec<String>,
    swap: bool,
    lvm: bool,
    raid: bool,
}

impl Uses {
    fn gather(&mut self, node: &Node, facts: &dyn Facts) {
        let mounts = node.mounts().filter(|mount| *mount != "[SWAP]");
        self.mounts.extend(mounts.map(str::to_string));
        self.swap |= node.children.is_empty() && node.is_swap(facts);
        for child in &node.children {
            self.lvm |= child.kind == "lvm";
            self.raid |= child.kind.starts_with("raid");
            self.gather(child, facts);
        }
    }
}

/// `vg0/pg` for the device-mapper name `vg0-pg` of a logical volume, in which a dash of a name is
/// doubled; everything else keeps its name.
fn display_name(node: &Node) -> String {
    if node.kind != "lvm" {
        return node.name.clone();
    }
    let doubled = node.name.replace("--", "\0");
    match doubled.split_once('-') {
        Some((group, volume)) => format!("{group}/{volume}").replace('\0', "-"),
        None => node.name.clone(),
    }
}

#[cfg(test)]
mod tests;
