//! Volumes behind the filter: the filter's process is asked to stand in front of a device, and what
//! it shares with the agent is opened.
//!
//! What is shared belongs to one run of the machine. If the filter had to begin anew (another device
//! under the same name), the memory that the agent has mapped is nobody's any more: [`FilteredDisk`]
//! notices, and the volume is opened anew, with a compare.

use crate::filter::client::{self, Client, FilterError, Listed};
use crate::source::attach::{NotAttached, Places};
use crate::source::seams::{Batch, Cutter, Disk, DiskError, Tracker};
use crate::source::volume::lock;
use secondsite_control::api::VolumeAssignment;
use secondsite_control::codes::Reason;
use secondsite_format::ids::VolumeId;
use secondsite_tracker::device::Device;
use secondsite_tracker::ebpf::Audit;
use secondsite_tracker::filter::beside::Beside;
use secondsite_tracker::filter::shared::{Group, ReserveState, Shared, group_path, volume_path};
use secondsite_tracker::marks::Marks;
use secondsite_tracker::splice::{Below, Lead, PAUSE_MAX, Refusal, Splicer, Through};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long the filter may take to answer, and to put itself in front of a device.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const ADD_LIMIT: Duration = Duration::from_secs(60);
/// Times that it is asked again when it was just being changed.
const TRIES_MAX: u32 = 3;

/// The filter in front of one volume.
pub struct FilterTracker {
    shared: Arc<Shared>,
    beside: Beside,
    backing: Device,
    /// The volume, for messages.
    path: PathBuf,
    /// Of a volume that the filter was put under: that it still leads through it.
    through: Option<Mutex<Through>>,
    /// Whether what it has in memory survives a power cut: why not, if it does not.
    keeps: NotAttached,
}

/// Finds the filter of a volume, or has it made; puts it under a volume of device-mapper.
pub fn behind_filter(
    assigned: &VolumeAssignment,
    device: &Device,
    places: &Places<'_>,
) -> Result<FilterTracker, NotAttached> {
    let splice = device.is_mapped() && !is_served(assigned, device, places.filter);
    let mut splicer = lock(places.splicer);
    let mut spliced = match splice {
        true => Some(prepare(assigned, device, &mut splicer)?),
        false => None,
    };
    let backing = match &spliced {
        Some(below) => Device::open(&below.node).map_err(|error| refused(error.to_string()))?,
        None => device.clone(),
    };
    let (shared, listed) = serve(assigned, &backing, places.filter)?;
    let beside = Beside::open(&backing).map_err(|error| refused(error.to_string()))?;
    let mut through = None;
    if let (Some(below), Some(splicer)) = (spliced.take(), splicer.as_mut()) {
        let served = listed.device.as_deref().unwrap_or(Path::new("/"));
        if below.through.is_none() {
            // Until now its writes went another way. Stored first: a crash after the change must
            // not leave marks that look whole.
            shared.marks().set_compare_due(true);
            splicer
                .insert(&device.path, &assigned.id, served, PAUSE_MAX)
                .map_err(|error| refused(error.to_string()))?;
            beside.rebase(&shared).map_err(refused)?;
        }
        let looks =
            Through::open(&device.path, served).map_err(|error| refused(error.to_string()))?;
        let why = || refused(format!("{} does not lead through its filter", device.path.display()));
        through = Some(Mutex::new(looks.ok_or_else(why)?));
    }
    let (shared, path) = (Arc::new(shared), device.path.clone());
    let keeps = keeps(assigned, &listed);
    Ok(FilterTracker { shared, beside, backing, path, through, keeps })
}

/// What becomes of the marks in a power cut, for people.
fn keeps(assigned: &VolumeAssignment, listed: &Listed) -> NotAttached {
    let text = listed.survives();
    match (listed.reserve_state.as_str(), &assigned.reserve) {
        ("log", _) => (Reason::FilterReserve, text),
        ("spill", _) | ("none", None) => (Reason::FilterMemoryOnly, text),
        (_, reserve) => {
            let which = reserve.as_deref().unwrap_or("its reserve");
            (Reason::FilterReserveFailed, format!("{text} ({which})"))
        }
    }
}

fn refused(why: String) -> NotAttached {
    (Reason::FilterFailed, why)
}

/// Whether the filter was put in front of the device itself: a volume of device-mapper that was
/// not in use.
fn is_served(assigned: &VolumeAssignment, device: &Device, dir: &Path) -> bool {
    let listed = Client::connect(dir, ANSWER_LIMIT).and_then(|client| client.list());
    let mut volumes = listed.into_iter().flatten();
    volumes.any(|listed| listed.id == assigned.id && listed.backing == device.path)
}

/// The device below, with the table that the volume has, or had before it was spliced.
fn prepare(
    assigned: &VolumeAssignment,
    device: &Device,
    splicer: &mut Option<Splicer>,
) -> Result<Below, NotAttached> {
    let none = || refused("device-mapper cannot be reached: see the agent's log".into());
    let splicer = splicer.as_mut().ok_or_else(none)?;
    let (path, id) = (&device.path, assigned.id.as_str());
    match splicer.prepare(path, id) {
        Err(error) if matches!(error.refusal(), Some(Refusal::Replaced)) => {
            // It was given another table: a longer one, as a rule.
            splicer.regrow(path, id, PAUSE_MAX).map_err(|error| refused(error.to_string()))
        }
        prepared => prepared.map_err(|error| refused(error.to_string())),
    }
}

/// Has the filter serve the backing device, and opens what it shares.
fn serve(
    assigned: &VolumeAssignment,
    backing: &Device,
    dir: &Path,
) -> Result<(Shared, Listed), NotAttached> {
    let mut again = true;
    loop {
        let listed = find(assigned, &backing.path, dir).map_err(|error| match error {
            FilterError::Silent { .. } => (Reason::FilterAbsent, error.to_string()),
            error => refused(error.to_string()),
        })?;
        if listed.block_bytes != assigned.block_bytes {
            return Err(refused(format!(
                "the filter of {} follows blocks of {} bytes, and {} are asked for",
                assigned.name, listed.block_bytes, assigned.block_bytes
            )));
        }
        if listed.device.is_none() {
            return Err(refused(format!("the filter of {}: {}", assigned.name, listed.state)));
        }
        let group = Group::open(&group_path(dir)).map_err(|error| refused(error.to_string()))?;
        let shared = Shared::open(&volume_path(dir, &assigned.id), &group)
            .map_err(|error| refused(error.to_string()))?;
        if let Some(reserve) = &listed.reserve {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC);
            match options.open(reserve) {
                Ok(file) => shared.set_reserve(file),
                // What is preserved there could not be read.
                Err(error) => {
                    tracing::warn!(reserve = %reserve.display(), %error, "open the reserve");
                    shared.reserve_failed();
                }
            }
        }
        let (served, now) = (shared.form().volume_bytes, backing.size_bytes);
        if served == now {
            return Ok((shared, listed));
        }
        if !std::mem::take(&mut again) {
            return Err(refused(format!(
                "the filter of {} goes up to {served} bytes, the device up to {now}",
                assigned.name
            )));
        }
        // A device of ublk keeps its size: another one takes its place.
        client::remove(dir, ADD_LIMIT, &assigned.id).map_err(|error| refused(error.to_string()))?;
    }
}

/// The name under `/dev/secondsite`.
pub fn stable_name(assigned: &VolumeAssignment) -> String {
    assigned.name.replace('/', "-")
}

/// The filter ends and begins with every change: one at a time, and again if another agent's change
/// came in between.
fn find(assigned: &VolumeAssignment, backing: &Path, dir: &Path) -> Result<Listed, FilterError> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE);
    let mut tries = 0;
    loop {
        let client = Client::connect(dir, ANSWER_LIMIT)?;
        match find_once(client, assigned, backing, dir) {
            Err(FilterError::Silent { .. }) if tries < TRIES_MAX => tries += 1,
            found => return found,
        }
    }
}

fn find_once(
    client: Client,
    assigned: &VolumeAssignment,
    backing: &Path,
    dir: &Path,
) -> Result<Listed, FilterError> {
    let volumes = client.list()?;
    drop(client);
    if let Some(listed) = volumes.into_iter().find(|listed| listed.id == assigned.id) {
        return Ok(listed);
    }
    let reserve = assigned.reserve.as_ref().map(PathBuf::from);
    let (name, block) = (stable_name(assigned), assigned.block_bytes);
    client::add(dir, ADD_LIMIT, &assigned.id, backing, &name, block, reserve.as_deref())
}

/// Takes the filter of a volume out; nothing there is fine. In front of a device, its users have to
/// be gone; from under a volume it is taken while that is in use.
pub fn take_out(dir: &Path, splicer: &Mutex<Option<Splicer>>, assigned: &VolumeAssignment) {
    let stays = |error: &dyn std::fmt::Display| {
        let (volume, name) = (&assigned.id, &assigned.name);
        tracing::warn!(volume, name, %error, "its filter stays: it passes everything through");
    };
    let listed = Client::connect(dir, ANSWER_LIMIT).and_then(|client| client.list());
    let Ok(volumes) = listed else { return };
    let Some(listed) = volumes.iter().find(|listed| listed.id == assigned.id) else { return };
    let mut splicer = lock(splicer);
    let splicer = splicer.as_mut().filter(|_| listed.backing != Path::new(&assigned.path));
    let Some(splicer) = splicer else {
        if let Err(error) = client::remove(dir, ADD_LIMIT, &assigned.id) {
            stays(&error);
        }
        return;
    };
    if let Err(error) = splicer.take_out(Path::new(&assigned.path), &assigned.id, PAUSE_MAX) {
        return stays(&error);
    }
    match client::remove(dir, ADD_LIMIT, &assigned.id) {
        Ok(()) => drop(splicer.remove_below(&assigned.id).map_err(|error| stays(&error))),
        Err(error) => stays(&error),
    }
}

impl FilterTracker {
    /// What the filter writes to.
    pub fn backing(&self) -> &Device {
        &self.backing
    }

    fn leads(&self) -> Lead {
        self.through.as_ref().map_or(Lead::Through, |through| lock(through).look())
    }
}

impl Tracker for FilterTracker {
    fn marks(&self) -> &Arc<Marks> {
        self.shared.marks()
    }
    fn audit(&self) -> Audit {
        match self.leads() {
            Lead::Through => self.beside.audit(&self.shared),
            lead => Audit::Gap(format!("{} went past its filter: {lead:?}", self.path.display())),
        }
    }
    fn rebase(&self) -> Result<(), String> {
        self.beside.rebase(&self.shared)
    }
    fn mounts(&self) -> Vec<PathBuf> {
        Vec::new()
    }
    fn sync(&self, _mount: &Path) -> Result<Duration, String> {
        Err("nothing to write back for".into())
    }
    fn writes_in_flight(&self) -> bool {
        let (completed, submitted) = self.shared.sectors(|| {});
        completed != submitted
    }
    fn filtered(&self) -> Option<&Arc<Shared>> {
        Some(&self.shared)
    }
    fn keeps(&self) -> Option<NotAttached> {
        Some(match self.shared.reserve() {
            ReserveState::Failed if self.keeps.0 != Reason::FilterReserveFailed => (
                Reason::FilterReserveFailed,
                "its reserve has failed; memory only: after a power cut all is compared".into(),
            ),
            _ => self.keeps.clone(),
        })
    }
}

/// The backing device, as long as the filter in front of it is the one whose memory is mapped, and
/// everything goes through it.
pub struct FilteredDisk {
    /// The backing device.
    pub disk: Box<dyn Disk>,
    /// Its filter.
    pub tracker: Arc<FilterTracker>,
}

impl Disk for FilteredDisk {
    fn check(&mut self) -> Result<(), DiskError> {
        let path = self.tracker.path.clone();
        let cause = match self.tracker.leads() {
            Lead::Through if self.tracker.shared.is_current() => return self.disk.check(),
            Lead::Through => "its filter began anew",
            Lead::Grown(sectors) => {
                let (before, now) = (self.tracker.backing.size_bytes, sectors << 9);
                return Err(DiskError::Grown { path, before, now });
            }
            Lead::Replaced => "its table was replaced, and it went past its filter",
            Lead::Gone => "there is no such volume any more",
        };
        Err(DiskError::Gone { path, cause: cause.into() })
    }
    fn submit(&mut self, batch: Batch) -> Result<(), DiskError> {
        self.disk.submit(batch)
    }
    fn wait(&mut self) -> Result<Batch, DiskError> {
        self.disk.wait()
    }
    fn outstanding(&self) -> usize {
        self.disk.outstanding()
    }
    fn urgent(&mut self, urgent: bool) {
        self.disk.urgent(urgent);
    }
}

/// Asks the filter's process for cuts.
pub struct FilterCutter {
    /// The folder of the filter.
    pub dir: PathBuf,
    /// The connection, until the filter is another process.
    pub client: Option<Client>,
}

impl Cutter for FilterCutter {
    fn cut(&mut self, volumes: &[VolumeId]) -> Result<u64, String> {
        let ids: Vec<String> = volumes.iter().map(ToString::to_string).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&self.dir, ANSWER_LIMIT).map_err(|error| error.to_string())?,
        };
        // Not asked again by itself: a cut whose answer was lost may have been made.
        let flip = client.cut(&ids).map_err(|error| error.to_string())?;
        self.client = Some(client);
        Ok(flip)
    }
}
