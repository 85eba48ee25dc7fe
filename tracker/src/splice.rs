//! Puts a filter under a device-mapper volume that is in use, and takes it out again.
//!
//! Volume V has a table T over disks. In: a device below gets the same T ([`Splicer::prepare`]); the
//! filter serves a device over that; V's table becomes "all of it to the filter's device"
//! ([`Splicer::insert`]). Out: V gets T, as the device below has it, and the device below goes.
//!
//! The change itself lasts as long as the I/O that is in flight: the kernel holds new I/O back, waits
//! until every write that went by the old table has completed, and only then lets the first one go
//! by the new. So no write of the one way can overtake one of the other, though both end on the same
//! disks. It neither flushes nor freezes the file system above (SKIP_LOCKFS): no snapshot is made,
//! and writing back what is dirty could take seconds. NOFLUSH stays off: it allows targets to hand
//! unfinished I/O back, and there is none here that would have a reason to.
//!
//! It is made by a small locked process under the eyes of another ([`child`]), within a limit; what
//! is changed is noted in /run first, and every start lets go on what stands there. Whatever fails,
//! V has its old table. What cannot be spliced is refused before anything is touched ([`rules`]).

pub mod beside;
mod child;
mod hide;
mod lvm;
mod rules;

pub use beside::{Lead, Through, Verdict, Written, leads_through};
#[doc(hidden)]
pub use child::Hook;
pub use hide::{HIDDEN_DIR, hide, show};
pub use rules::Refusal;

use crate::device::{Device, DeviceError, folders_in, name_of, number_of, sysfs_of};
use crate::dm::{Control, DmError, Number, Status, Table, Target};
use child::Outcome;
use rules::Shape;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest time for which a volume's I/O may be held back.
pub const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long others (udev looks at every new device) may keep the device below open when it goes.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(20);
/// Unit of device-mapper, and of sizes in sysfs.
const SECTOR_BYTES: u64 = 512;
/// Devices on devices: deeper stacks are a loop in sysfs.
const STACK_DEPTH_MAX: usize = 16;
/// Every device that we make has a name that begins so; the rules for udev go by it.
const PREFIX: &str = "secondsite-";
/// Name of the note, and of the file that is locked by who may write it.
const NOTE: &str = "suspended";
const LOCK: &str = "lock";
/// How long another process may take for its last change.
const LOCK_MAX: Duration = Duration::from_secs(3);

/// Why a volume was not spliced. It has its old table, and is not suspended.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {cause}; {remedy}", .device.display())]
pub struct SpliceError {
    /// What was wanted.
    pub operation: &'static str,
    /// Of which volume.
    pub device: PathBuf,
    /// Why it is not done.
    pub cause: Cause,
    /// What to do.
    pub remedy: &'static str,
}

/// What a [`SpliceError`] comes from.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// It is not done with such a volume; nothing was touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The volume cannot be looked at.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel refused.
    #[error(transparent)]
    DeviceMapper(#[from] DmError),
    /// A file, or the start of a process, failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What was in flight did not end in time.
    #[error("its I/O in flight took longer than {} ms", .0.as_millis())]
    Slow(Duration),
    /// The process that changes tables is gone.
    #[error("the process that changes tables died")]
    Died,
}

impl SpliceError {
    fn new(operation: &'static str, device: &Path, cause: Cause) -> Self {
        let remedy = match &cause {
            Cause::Refused(refusal) => refusal.remedy(),
            Cause::Device(_) => "name a volume that exists",
            Cause::DeviceMapper(error) if error.source.kind() == io::ErrorKind::NotFound => {
                "load the kernel's module dm_mod"
            }
            // What crypt answers to a key of a keyring.
            Cause::DeviceMapper(error) if error.source.raw_os_error() == Some(libc::ENOKEY) => {
                Refusal::KeyInKeyring.remedy()
            }
            Cause::DeviceMapper(_) => "the kernel's log (dmesg) says more",
            Cause::Io(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                "another process changes tables: wait for it, or stop it"
            }
            Cause::Io(_) => "run it as root, on a machine with a writable /run",
            Cause::Slow(_) => "try again when the volume is less busy",
            Cause::Died => "try again after a restart of this process",
        };
        Self { operation, device: device.into(), cause, remedy }
    }

    fn io(operation: &'static str, device: &Path, error: io::Error) -> Self {
        Self::new(operation, device, Cause::Io(error))
    }

    /// Whether it is refused, and why.
    pub fn refusal(&self) -> Option<&Refusal> {
        match &self.cause {
            Cause::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}

impl From<DeviceError> for SpliceError {
    fn from(error: DeviceError) -> Self {
        let path = error.path.clone();
        Self::new("look at", &path, error.into())
    }
}

impl From<DmError> for SpliceError {
    fn from(error: DmError) -> Self {
        let device = PathBuf::from(&error.device);
        Self::new("ask device-mapper about", &device, error.into())
    }
}

/// The device that has a volume's own table, for the filter to serve from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Below {
    /// Its node; there without udev.
    pub node: PathBuf,
    /// Its name in device-mapper.
    pub name: String,
    /// Its number.
    pub number: Number,
    /// Its size; the filter's device must have the same.
    pub sectors: u64,
    /// The filter's device, if the volume leads through one already.
    pub through: Option<Number>,
}

/// What a change of the volume's table came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was made; for so long the volume's I/O may have waited.
    Made(Duration),
    /// It was so already.
    Already,
}

/// Whether a device of this name was made by [`Splicer::prepare`].
pub fn is_below(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with("-below"))
}

/// Reads what a volume leads to: its targets, and the number of its events.
pub fn describe(volume: &Path) -> Result<Table, SpliceError> {
    let device = Device::open(volume)?;
    let number = Number { major: device.major, minor: device.minor };
    if !is_device_mapper(number) {
        let refusal = Refusal::NotDeviceMapper.into();
        return Err(SpliceError::new("read the table of", volume, refusal));
    }
    Ok(Control::open()?.table(number)?)
}

/// Changes tables. Start it before the process has threads.
pub struct Splicer {
    control: Control,
    note: PathBuf,
    /// Closed first, which ends the guard.
    guard: Option<OwnedFd>,
    guard_pid: libc::pid_t,
    /// Locked; the guard has it too.
    _lock: File,
    resumed: Vec<String>,
}

/// A volume as it is now.
struct Volume {
    device: Device,
    table: Table,
    shape: Shape,
}

impl Splicer {
    /// Starts the guard. `note_dir` (under /run) is where it is noted what is being changed; what
    /// stands there from an earlier process goes on first.
    pub fn start(note_dir: &Path) -> Result<Self, SpliceError> {
        Self::start_with(note_dir, Hook::None)
    }

    #[doc(hidden)]
    pub fn start_with(note_dir: &Path, hook: Hook) -> Result<Self, SpliceError> {
        let fails = |error| SpliceError::io("note changes in", note_dir, error);
        let control = Control::open()?;
        fs::create_dir_all(note_dir).map_err(fails)?;
        let note = note_dir.join(NOTE);
        let lock = lock(&note_dir.join(LOCK)).map_err(fails)?;
        let resumed = settle_noted(&control, &note).map_err(fails)?;
        let (guard_pid, guard) =
            child::start(control.as_raw_fd(), lock.as_raw_fd(), hook).map_err(fails)?;
        Ok(Self { control, note, guard: Some(guard), guard_pid, _lock: lock, resumed })
    }

    /// The volumes that an earlier process had left suspended, and that this start let go on.
    pub fn resumed(&self) -> &[String] {
        &self.resumed
    }

    /// Makes the device below `volume`, by the name `secondsite-ID-below`, or finds it as it was made
    /// before. The volume itself is not touched.
    pub fn prepare(&mut self, volume: &Path, id: &str) -> Result<Below, SpliceError> {
        const OPERATION: &str = "prepare a filter for";
        let refused = |refusal: Refusal| SpliceError::new(OPERATION, volume, refusal.into());
        let found = self.find(id).map_err(|error| error.of(OPERATION, volume))?;
        let now = self.volume(OPERATION, volume)?;
        let Some(below) = found else {
            self.may_be_spliced(&now).map_err(refused)?;
            return self.make_below(&now, id).map_err(|error| error.of(OPERATION, volume));
        };
        let table = self.control.table(below.number)?;
        if table.targets == now.table.targets {
            self.may_be_spliced(&now).map_err(refused)?;
            return Ok(describe_below(&below, &table, None));
        }
        match through_of(&now, &below) {
            Some(through) if table.sectors() == now.shape.sectors => {
                Ok(describe_below(&below, &table, Some(through)))
            }
            _ => Err(refused(Refusal::Replaced)),
        }
    }

    /// Lets `volume` lead through the filter's device `through`, which serves the device below.
    pub fn insert(
        &mut self,
        volume: &Path,
        id: &str,
        through: &Path,
        limit: Duration,
    ) -> Result<Change, SpliceError> {
        const OPERATION: &str = "put a filter under";
        let refused = |refusal: Refusal| SpliceError::new(OPERATION, volume, refusal.into());
        let below = self.find_prepared(OPERATION, volume, id)?;
        let _lock = group_lock(OPERATION, volume, &self.control)?;
        let now = self.volume(OPERATION, volume)?;
        let device = Device::open(through)?;
        let through = shape_of(&device);
        if now.table.leads_to() == Some(through.number) && through.sectors == now.shape.sectors {
            return Ok(Change::Already);
        }
        if self.control.table(below.number)?.targets != now.table.targets {
            return Err(refused(Refusal::Replaced));
        }
        self.may_be_spliced(&now).map_err(refused)?;
        rules::may_lead(&now.shape, &through).map_err(refused)?;
        let targets = [Target::linear_over(through.number, now.shape.sectors)];
        self.change(OPERATION, volume, now.table.status, &targets, limit)
    }

    /// Lets `volume` lead to its disks again, by the table that the device below has. The filter's
    /// device is not used any more then; [`Self::remove_below`] is for when it is stopped.
    pub fn take_out(
        &mut self,
        volume: &Path,
        id: &str,
        limit: Duration,
    ) -> Result<Change, SpliceError> {
        const OPERATION: &str = "take the filter out from under";
        let refused = |refusal: Refusal| SpliceError::new(OPERATION, volume, refusal.into());
        let below = self.find_prepared(OPERATION, volume, id)?;
        let _lock = group_lock(OPERATION, volume, &self.control)?;
        let now = self.volume(OPERATION, volume)?;
        let table = self.control.table(below.number)?;
        if table.targets == now.table.targets {
            return Ok(Change::Already);
        }
        if through_of(&now, &below).is_none() || table.sectors() != now.shape.sectors {
            return Err(refused(Refusal::Replaced));
        }
        may_be_changed(&now.table.status).map_err(refused)?;
        self.change(OPERATION, volume, now.table.status, &table.targets, limit)
    }

    /// Follows a volume that was given another table, as a rule a longer one (`lvextend`): the device
    /// below gets it too. Since then its writes have gone beside the filter, and they do until
    /// [`Self::insert`]: so first everything is prepared for the new size, then the volume leads
    /// through it, and then what was written in between has to be found by a compare. No write is
    /// lost by the change itself: the volume's I/O always has one complete way to the disks.
    pub fn regrow(
        &mut self,
        volume: &Path,
        id: &str,
        limit: Duration,
    ) -> Result<Below, SpliceError> {
        const OPERATION: &str = "follow the new table of";
        let refused = |refusal: Refusal| SpliceError::new(OPERATION, volume, refusal.into());
        let below = self.find_prepared(OPERATION, volume, id)?;
        let _lock = group_lock(OPERATION, volume, &self.control)?;
        let now = self.volume(OPERATION, volume)?;
        let table = self.control.table(below.number)?;
        if let Some(through) = through_of(&now, &below)
            && table.sectors() == now.shape.sectors
        {
            return Ok(describe_below(&below, &table, Some(through)));
        }
        self.may_be_spliced(&now).map_err(refused)?;
        rules::may_follow(table.sectors(), now.shape.sectors).map_err(refused)?;
        if table.targets != now.table.targets {
            // The filter may be reading there: changed with the same care as the volume.
            self.change(OPERATION, volume, table.status, &now.table.targets, limit)?;
        }
        Ok(describe_below(&below, &now.table, None))
    }

    /// Removes the device below, when nobody uses it any more.
    pub fn remove_below(&mut self, id: &str) -> Result<(), SpliceError> {
        const OPERATION: &str = "remove the device below of";
        let name = PathBuf::from(id);
        let Some(below) = self.find(id).map_err(|error| error.of(OPERATION, &name))? else {
            return Ok(());
        };
        let start = Instant::now();
        loop {
            match self.control.remove(below.number) {
                Err(error) if error.is_busy() && start.elapsed() < CLOSE_MAX => {
                    std::thread::sleep(PAUSE);
                }
                other => return Ok(other?),
            }
        }
    }

    /// The device below, by the name that `id` makes.
    fn find(&self, id: &str) -> Result<Option<Status>, Cause> {
        if !rules::is_name(id) {
            return Err(Refusal::Name(id.into()).into());
        }
        let found = self.control.find(&below_name(id))?;
        match found {
            Some(status) if status.uuid() != below_uuid(id) => {
                Err(Refusal::Foreign(below_name(id)).into())
            }
            Some(status) if self.control.table(status.number)?.targets.is_empty() => {
                // Who made it died before it had a table.
                self.control.remove(status.number)?;
                Ok(None)
            }
            other => Ok(other),
        }
    }

    fn find_prepared(
        &self,
        operation: &'static str,
        volume: &Path,
        id: &str,
    ) -> Result<Status, SpliceError> {
        self.find(id)
            .and_then(|found| found.ok_or_else(|| Refusal::NotPrepared.into()))
            .map_err(|cause| cause.of(operation, volume))
    }

    fn volume(&self, operation: &'static str, volume: &Path) -> Result<Volume, SpliceError> {
        let device = Device::open(volume)?;
        let shape = shape_of(&device);
        if !is_device_mapper(shape.number) {
            return Err(SpliceError::new(operation, volume, Refusal::NotDeviceMapper.into()));
        }
        let table = self.control.table(shape.number)?;
        Ok(Volume { device, table, shape })
    }

    /// Whether the filter may be put under the volume as it is.
    fn may_be_spliced(&self, volume: &Volume) -> Result<(), Refusal> {
        may_be_changed(&volume.table.status)?;
        if volume.table.status.read_only {
            return Err(Refusal::ReadOnly);
        }
        if let Some(ours) = devices_under(volume.shape.number).into_iter().find_map(our_device) {
            return Err(Refusal::AlreadyThrough(ours));
        }
        rules::may_be_doubled(&volume.table.targets)?;
        // What cannot be listed is taken for the worst.
        let mounts = volume.device.mounts();
        if mounts.map_or(true, |mounts| mounts.iter().any(|mount| mount.path == Path::new("/"))) {
            return Err(Refusal::Root);
        }
        match volume.device.swaps().map(|swaps| swaps.into_iter().next()) {
            Ok(None) => Ok(()),
            Ok(Some(swap)) => Err(Refusal::Swap(swap)),
            Err(error) => Err(Refusal::Swap(error.path)),
        }
    }

    fn make_below(&self, volume: &Volume, id: &str) -> Result<Below, Cause> {
        let status = self.control.create(&below_name(id), &below_uuid(id))?;
        let filled = self
            .control
            .load(status.number, &volume.table.targets)
            .and_then(|()| self.control.resume(status.number))
            .and_then(|()| self.control.table(status.number));
        match filled {
            Ok(table) if table.targets == volume.table.targets => {
                Ok(describe_below(&status, &table, None))
            }
            other => {
                // Nothing uses it yet; what stays behind is found by the next try.
                let _ = self.control.remove(status.number);
                Err(other.err().map_or(Refusal::Replaced.into(), Cause::from))
            }
        }
    }

    /// Replaces the live table of `device`, all or nothing.
    fn change(
        &mut self,
        operation: &'static str,
        volume: &Path,
        device: Status,
        targets: &[Target],
        limit: Duration,
    ) -> Result<Change, SpliceError> {
        let fails = |cause: Cause| SpliceError::new(operation, volume, cause);
        let guard = self.guard.as_ref().ok_or_else(|| fails(Cause::Died))?;
        write_note(&self.note, &device).map_err(|error| fails(error.into()))?;
        let limit = limit.min(PAUSE_MAX);
        let number = device.number;
        if let Err(error) = self.control.load(number, targets) {
            self.forget();
            return Err(fails(error.into()));
        }
        // From here until the answer nothing is allocated, opened or logged.
        let outcome = child::swap(guard, number.encoded(), limit);
        if outcome.is_err() {
            self.guard = None;
            child::settle(self.control.as_raw_fd(), number.encoded());
        }
        // What counts is what the kernel has now.
        let live = self.control.table(number);
        let is_made = live.is_ok_and(|table| table.targets == targets && !table.status.suspended);
        if !is_made {
            let _ = self.control.clear(number);
        }
        self.forget();
        match outcome {
            Ok(Outcome::Done { pause, .. } | Outcome::Late { pause } | Outcome::Died { pause })
                if is_made =>
            {
                Ok(Change::Made(pause))
            }
            Ok(Outcome::Done { errno, .. }) => {
                let source = io::Error::from_raw_os_error(errno);
                let device = number.to_string();
                Err(fails(DmError { operation: "change the table of", device, source }.into()))
            }
            Ok(Outcome::Late { .. }) => Err(fails(Cause::Slow(limit))),
            Ok(Outcome::Died { .. }) | Err(_) => Err(fails(Cause::Died)),
        }
    }

    /// Nothing is being changed any more.
    fn forget(&self) {
        // A note that stays is looked at in vain at the next start.
        let _ = fs::remove_file(&self.note);
    }
}

impl Drop for Splicer {
    fn drop(&mut self) {
        drop(self.guard.take());
        crate::locked::wait_for_end(self.guard_pid);
    }
}

impl Cause {
    fn of(self, operation: &'static str, device: &Path) -> SpliceError {
        SpliceError::new(operation, device, self)
    }
}

fn below_name(id: &str) -> String {
    format!("{PREFIX}{id}-below")
}

fn below_uuid(id: &str) -> String {
    format!("SECONDSITE-{id}-below")
}

fn describe_below(status: &Status, table: &Table, through: Option<Number>) -> Below {
    Below {
        node: status.number.node().unwrap_or_else(|| Path::new("/dev/mapper").join(status.name())),
        name: status.name(),
        number: status.number,
        sectors: table.sectors(),
        through,
    }
}

/// The filter's device, if all of the volume leads there: one device that is none of the disks.
fn through_of(volume: &Volume, below: &Status) -> Option<Number> {
    let through = volume.table.leads_to()?;
    (!devices_under(below.number).contains(&through)).then_some(through)
}

fn may_be_changed(status: &Status) -> Result<(), Refusal> {
    if status.suspended || status.has_loaded_table { Err(Refusal::BeingChanged) } else { Ok(()) }
}

fn group_lock(
    operation: &'static str,
    volume: &Path,
    control: &Control,
) -> Result<Option<lvm::GroupLock>, SpliceError> {
    let device = Device::open(volume)?;
    let number = Number { major: device.major, minor: device.minor };
    if !is_device_mapper(number) {
        return Ok(None);
    }
    let status = control.status(number)?;
    lvm::lock(&status).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            let group = lvm::group_of(&status.name());
            SpliceError::new(operation, volume, Refusal::GroupLocked(group).into())
        }
        _ => SpliceError::io(operation, volume, error),
    })
}

fn shape_of(device: &Device) -> Shape {
    let number = Number { major: device.major, minor: device.minor };
    let mut lies_on = vec![number];
    let mut level = vec![number];
    for _ in 0..STACK_DEPTH_MAX {
        level = level.into_iter().flat_map(devices_under).collect();
        lies_on.extend(&level);
    }
    Shape {
        number,
        node: device.path.clone(),
        sectors: device.size_bytes / SECTOR_BYTES,
        block_bytes: device.logical_block_bytes,
        lies_on,
    }
}

fn is_device_mapper(number: Number) -> bool {
    sysfs_of(number.major, number.minor).join("dm").exists()
}

/// The devices that one lies on directly.
fn devices_under(number: Number) -> Vec<Number> {
    let folders = folders_in(&sysfs_of(number.major, number.minor).join("slaves"));
    let numbers = folders.iter().filter_map(|folder| number_of(folder));
    numbers.map(|(major, minor)| Number { major, minor }).collect()
}

/// The name of a device that is a filter's, or one below a filter.
fn our_device(number: Number) -> Option<String> {
    let sysfs = sysfs_of(number.major, number.minor);
    let dm = fs::read_to_string(sysfs.join("dm/name")).unwrap_or_default();
    let name = name_of(&sysfs);
    match dm.trim() {
        ours if ours.starts_with(PREFIX) => Some(ours.into()),
        _ if name.starts_with("ublkb") => Some(name),
        _ => None,
    }
}

/// One process at a time: a start would take what another is changing for what a dead one left.
fn lock(path: &Path) -> io::Result<File> {
    let file = File::options().create(true).append(true).open(path)?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_MAX => {
                std::thread::sleep(PAUSE);
            }
            Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::ResourceBusy.into()),
        }
    }
}

/// The note: number, UUID and name of the volume, a NUL after each.
fn write_note(note: &Path, device: &Status) -> io::Result<()> {
    fs::write(note, format!("{}\0{}\0{}\0", device.number, device.uuid(), device.name()))
}

/// Lets go on what an earlier process noted and left suspended, with the table that it has; returns
/// the names.
fn settle_noted(control: &Control, note: &Path) -> io::Result<Vec<String>> {
    let text = match fs::read_to_string(note) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut resumed = Vec::new();
    if let [number, uuid, name, ..] = text.split('\0').collect::<Vec<_>>().as_slice()
        && let Ok(Some(status)) = control.find(name)
        // Numbers and names are given again: only the very one is ours to touch.
        && (status.number.to_string(), status.uuid()) == (number.to_string(), uuid.to_string())
    {
        child::settle(control.as_raw_fd(), status.number.encoded());
        if status.suspended {
            resumed.push(name.to_string());
        }
    }
    fs::remove_file(note)?;
    Ok(resumed)
}
