//! From an assignment to a volume: opens the device, chooses the tracker, and adapts the tracker's
//! types to the seams. The only module of the source that knows them.

use crate::pulse;
use crate::source::buffers::Memory;
use crate::source::filter::{FilterTracker, FilteredDisk, behind_filter};
use crate::source::observation::Freezes;
use crate::source::reader::RingDisk;
use crate::source::runs::Shape;
use crate::source::seams::{Disk, DiskError, Freeze, Tracker};
use crate::source::volume::{Bell, Face, Volume, lock};
use secondsite_control::api::{TrackerChoice, VolumeAssignment};
use secondsite_control::codes::Reason;
use secondsite_tracker::device::Device;
use secondsite_tracker::ebpf::{Audit, Ebpf};
use secondsite_tracker::freeze::{Freezer, sync_file_system};
use secondsite_tracker::marks::Marks;
use secondsite_tracker::splice::Splicer;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Why a volume is not attached: its code, and for people what, why, and the remedy.
pub type NotAttached = (Reason, String);

/// Where what outlives this process is found.
pub struct Places<'a> {
    /// The volume's pins.
    pub pins: &'a Path,
    /// The folder of the filter.
    pub filter: &'a Path,
    /// Puts it under volumes in use.
    pub splicer: &'a Mutex<Option<Splicer>>,
}

/// Opens what is assigned.
pub fn attach(
    assigned: &VolumeAssignment,
    places: &Places<'_>,
    face: &Arc<Face>,
    memory: &Memory,
    coordinator: &Arc<Bell>,
) -> Result<(Volume, Option<Arc<EbpfTracker>>), NotAttached> {
    let path = PathBuf::from(&assigned.path);
    let device = Device::open(&path).map_err(|error| (Reason::DeviceGone, error.to_string()))?;
    let shape = Shape::new(device.size_bytes, assigned.block_bytes, &assigned.excluded);
    let read_bytes = face.read_bytes.clone();
    let disk = RingDisk::open(device.clone(), assigned.block_bytes, &memory.arena, read_bytes)
        .map_err(|error| (error.code(), error.to_string()))?;
    let mut disk: Box<dyn Disk> = Box::new(disk);
    let read_bytes = face.read_bytes.clone();
    let (chosen, why_not) = choose(assigned, &device, places)?;
    // One that has grown since it was protected is followed as it is now. After the tracker, which
    // notes a compare with its marks when it finds the device smaller than they are.
    if device.size_bytes < assigned.size_bytes {
        return Err(shrunk(&device, assigned.size_bytes));
    }
    let (name, tracker, ebpf): (_, Arc<dyn Tracker>, _) = match chosen {
        Chosen::Filter(tracker) => {
            // Below the filter: a read above it would only pass through it.
            let below = tracker.backing().clone();
            let below = RingDisk::open(below, assigned.block_bytes, &memory.arena, read_bytes)
                .map_err(|error| (error.code(), error.to_string()))?;
            disk = Box::new(FilteredDisk { disk: Box::new(below), tracker: tracker.clone() });
            ("ublk", tracker, None)
        }
        Chosen::Ebpf(ebpf) => ("ebpf", ebpf.clone(), Some(ebpf)),
        Chosen::Compare => {
            let marks = Arc::new(Marks::in_memory(shape.blocks()));
            ("compare", Arc::new(CompareTracker { marks }), None)
        }
    };
    face.update(|status| {
        status.tracker = name;
        (status.tracker_code, status.tracker_reason) =
            why_not.map_or_else(Default::default, |(code, why)| (Some(code), why));
    });
    let (face, bell) = (face.clone(), coordinator.clone());
    let volume = Volume::new(face, shape, tracker, name == "compare", path, disk, bell);
    Ok((volume, ebpf))
}

/// What follows the writes.
enum Chosen {
    Filter(Arc<FilterTracker>),
    Ebpf(Arc<EbpfTracker>),
    Compare,
}

fn shrunk(device: &Device, before: u64) -> NotAttached {
    let (path, now) = (device.path.clone(), device.size_bytes);
    (Reason::DeviceShrunk, DiskError::Shrunk { path, before, now }.to_string())
}

/// The tracker, and why it is no better one.
fn choose(
    assigned: &VolumeAssignment,
    device: &Device,
    places: &Places<'_>,
) -> Result<(Chosen, Option<NotAttached>), NotAttached> {
    let pins = places.pins;
    let mut no_filter = None;
    let wanted = assigned.tracker == TrackerChoice::Ublk;
    if wanted || assigned.tracker == TrackerChoice::Auto && device.is_mapped() {
        match behind_filter(assigned, device, places) {
            Ok(filter) => {
                remove_pins(pins);
                let keeps = filter.keeps();
                return Ok((Chosen::Filter(Arc::new(filter)), keeps));
            }
            Err(why) if wanted => return Err(why),
            Err((_, why)) => no_filter = Some(why),
        }
    }
    if assigned.tracker == TrackerChoice::Compare {
        remove_pins(pins);
        let why = (Reason::CompareAsked, "asked for with --tracker compare".into());
        return Ok((Chosen::Compare, Some(why)));
    }
    match Ebpf::supported() {
        Ok(()) => {
            let (ebpf, start) =
                Ebpf::attach(device, assigned.block_bytes, pins).map_err(|error| {
                    match error.shrunk_from {
                        Some(before) => shrunk(device, before),
                        None => (Reason::TrackerFailed, error.to_string()),
                    }
                })?;
            tracing::info!(volume = assigned.id, name = assigned.name,
                device = %device.path.display(), ?start, "tracked by eBPF");
            let marks = ebpf.marks().clone();
            let device = device.clone();
            let ebpf = Mutex::new(Some(ebpf));
            let why = no_filter.map(|why| (Reason::FilterFailed, format!("no filter: {why}")));
            Ok((Chosen::Ebpf(Arc::new(EbpfTracker { ebpf, marks, device })), why))
        }
        Err(why) if assigned.tracker == TrackerChoice::Ebpf => Err((
            Reason::TrackerUnavailable,
            format!("--tracker ebpf cannot run here: {why}; --tracker auto would compare instead"),
        )),
        Err(why) => {
            let why = format!("eBPF cannot run here: {why}; every cut compares everything");
            Ok((Chosen::Compare, Some((Reason::CompareNoEbpf, why))))
        }
    }
}

/// Removes what is pinned for a volume; nothing there is fine.
pub fn remove_pins(pins: &Path) {
    if pins.exists()
        && let Err(error) = Ebpf::remove_pins(pins)
    {
        tracing::warn!(path = %pins.display(), %error, "pins stay");
    }
}

/// The eBPF back end of one volume.
pub struct EbpfTracker {
    ebpf: Mutex<Option<Ebpf>>,
    marks: Arc<Marks>,
    device: Device,
}

impl EbpfTracker {
    /// Detaches and removes the pins; marks stay readable, nothing marks any more.
    pub fn detach(&self) {
        if let Some(ebpf) = lock(&self.ebpf).take()
            && let Err(error) = ebpf.detach()
        {
            tracing::warn!(%error, "detach");
        }
    }
}

impl Tracker for EbpfTracker {
    fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }
    fn audit(&self) -> Audit {
        lock(&self.ebpf).as_ref().map_or(Audit::Gap("it was detached".into()), Ebpf::audit)
    }
    fn rebase(&self) -> Result<(), String> {
        match lock(&self.ebpf).as_ref() {
            Some(ebpf) => ebpf.rebase().map_err(|error| error.to_string()),
            None => Err("it was detached".into()),
        }
    }
    fn mounts(&self) -> Vec<PathBuf> {
        let mounts = pulse::outside(|| self.device.mounts()).unwrap_or_default();
        mounts.into_iter().filter(|mount| mount.freezable).map(|mount| mount.path).collect()
    }
    fn sync(&self, mount: &Path) -> Result<Duration, String> {
        pulse::outside(|| sync_file_system(mount)).map_err(|error| error.to_string())
    }
    fn writes_in_flight(&self) -> bool {
        self.device.in_flight().map_or(true, |(_, writes)| writes > 0)
    }
}

/// No tracker: marks that only a compare makes.
struct CompareTracker {
    marks: Arc<Marks>,
}

impl Tracker for CompareTracker {
    fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }
    fn audit(&self) -> Audit {
        Audit::Gap("nothing tracks this volume".into())
    }
    fn rebase(&self) -> Result<(), String> {
        Ok(())
    }
    fn mounts(&self) -> Vec<PathBuf> {
        Vec::new()
    }
    fn sync(&self, _mount: &Path) -> Result<Duration, String> {
        Err("nothing to write back for".into())
    }
    fn writes_in_flight(&self) -> bool {
        false
    }
}

/// The freezer, with what came of its freezes.
pub struct CountedFreezer {
    /// The child.
    pub freezer: Freezer,
    /// For metrics.
    pub freezes: Freezes,
}

impl Freeze for CountedFreezer {
    fn freeze(&mut self, mounts: &[PathBuf], limit: Duration) -> Result<(), String> {
        let frozen = pulse::outside(|| self.freezer.freeze(mounts, limit));
        frozen.map_err(|error| {
            self.freezes.failed();
            error.to_string()
        })
    }
    fn thaw(&mut self) -> Result<(Duration, bool), String> {
        let thawed = pulse::outside(|| self.freezer.thaw());
        // Counted only now: between freeze and thaw nothing is locked.
        match &thawed {
            Ok((took, true)) => self.freezes.durations.observe(took.as_secs_f64()),
            Ok((_, false)) | Err(_) => self.freezes.failed(),
        }
        thawed.map_err(|error| error.to_string())
    }
}
