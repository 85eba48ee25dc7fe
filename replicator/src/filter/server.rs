//! The server: carries the requests of every volume in the list until it ends or is ended.
//!
//! What is left of the server before is taken over first, then new volumes are added, then those
//! are taken out that shall go. A volume that cannot be had does not keep the others from being
//! served. A device that exists is served whatever happens to its backing device: without one its
//! requests fail, as they would below.

use super::say::say;
use super::socket::{Heard, Speaker};
use super::volumes::{self, Entry, VOLUMES_MAX, Wish};
use super::{Places, keeper, locked, unavailable};
use crate::cli::args::FilterArgs;
use crate::cli::failure::{Exit, Failure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use secondsite_tracker::device::Device;
use secondsite_tracker::filter::beside::Beside;
use secondsite_tracker::filter::gate::{Bug, Gate, NotCut};
use secondsite_tracker::filter::reserve::{Part, owner_text};
use secondsite_tracker::filter::shared::{
    Form, Group, ReserveState, Shared, group_path, volume_path,
};
use secondsite_tracker::ublk::abi::{DeviceInfo, STATE_DEAD};
use secondsite_tracker::ublk::device::{DEPTH, is_ours, mark_of, node_of, queues_for};
use secondsite_tracker::ublk::log::Found;
use secondsite_tracker::ublk::{
    Backing, Control, Log, Options, Reserve, Served, UblkError, Volume,
};
use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where stable names are.
const NAMES: &str = "/dev/secondsite";
/// How long a backing device may be busy when a device is taken over: the ring of the server before
/// holds it until its last request has come back.
const BUSY_PATIENCE: Duration = Duration::from_secs(30);
const BUSY_POLL: Duration = Duration::from_millis(1);
/// How often a device that is not there yet is looked for, and whether a reserve has failed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a reserve may take to appear when the machine starts.
const RESERVE_PATIENCE: Duration = Duration::from_secs(10);

/// What became of an entry.
/// What is shared with the agent, the opened reserve, and the write-intent log on it.
type SharedParts = (Arc<Shared>, Option<Arc<Backing>>, Option<Log>);

struct Slot {
    entry: Entry,
    /// Who decides on its writes, once its backing device could be had.
    gate: Option<Arc<Gate>>,
    log: Option<Arc<Log>>,
    served: Option<Served>,
    /// `served`, or what is wrong.
    state: String,
    /// Worth another start when its backing device can be had.
    missing: bool,
}

impl Slot {
    fn without(entry: Entry, state: String, missing: bool) -> Self {
        Self { entry, gate: None, log: None, served: None, state, missing }
    }

    fn reserve(&self) -> ReserveState {
        self.gate.as_ref().map_or(ReserveState::None, |gate| gate.shared().reserve())
    }
}

/// A server from its start to its end.
pub(super) struct Server<'a> {
    places: &'a Places,
    control: Control,
    slots: Vec<Slot>,
    reserves: BTreeMap<PathBuf, Reserve>,
    machine: String,
    group: Group,
    preserve_bytes: u64,
    bug: Option<Bug>,
}

fn mistake(name: &str) -> Result<Bug, Failure> {
    Bug::named(name).ok_or_else(|| Failure::new(Exit::Usage, format!("no known mistake {name:?}")))
}

/// Runs a server; comes back when it shall end, be it for good or for the next one.
pub(super) fn run(
    places: &Places,
    args: &FilterArgs,
    listener: &OwnedFd,
    say_ready: OwnedFd,
) -> Result<(), Failure> {
    locked::process()?;
    let _lock = keeper::server_lock(places)?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|error| Failure::new(Exit::Failed, format!("filter: signals: {error}")))?;
    let entries = volumes::read(&places.list_here())
        .map_err(|why| Failure::new(Exit::Config, format!("filter: {why}")))?;
    let control = Control::open().map_err(unavailable)?;
    let group = Group::open(&group_path(&places.dir))
        .map_err(|error| Failure::new(Exit::Failed, format!("filter: {error}")))?;
    let (slots, reserves) = (Vec::new(), BTreeMap::new());
    let bug = args.mistake.as_deref().map(mistake).transpose()?;
    let preserve_bytes = args.preserve;
    let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let machine = owner_text(&machine);
    let mut server =
        Server { places, control, slots, reserves, machine, group, preserve_bytes, bug };
    let options = Options { reissue: !args.no_reissue, queues: args.queues };
    server.start(entries, options)?;
    // Nobody reads it after the first: no keeper, or one that knows.
    let _ = nix::unistd::write(&say_ready, &[1]);
    drop(say_ready);

    let mut speaker = Speaker::new(listener);
    loop {
        server.look_at_reserves();
        let looks = |slot: &Slot| slot.missing || slot.entry.reserve.is_some();
        let wait = server.slots.iter().any(looks).then_some(LOOK_EVERY);
        match speaker.listen(&signals, wait, |line| server.answer(line)) {
            Heard::Signal | Heard::Change => return Ok(()),
            Heard::Nothing => {
                let missing = server.slots.iter().filter(|slot| slot.missing);
                let mut found = missing.filter(|slot| Backing::open(&slot.entry.backing).is_ok());
                if found.next().is_some() {
                    return Ok(());
                }
            }
        }
    }
}

/// A queue cannot go on: the next server can.
fn queue_failed(why: &str) {
    say(&format!("a queue ended: {why}"));
    // SAFETY: ends the process; its threads and rings end with it.
    unsafe { libc::_exit(Exit::Failed as i32) }
}

impl Server<'_> {
    fn start(&mut self, entries: Vec<Entry>, options: Options) -> Result<(), Failure> {
        let failed = |error: &dyn std::fmt::Display| {
            Failure::new(Exit::Failed, format!("filter: list the devices of ublk: {error}"))
        };
        let all = self.control.devices().map_err(|error| failed(&error))?;
        let mut ours: BTreeMap<u64, DeviceInfo> = BTreeMap::new();
        for info in all.into_iter().filter(is_ours) {
            if info.state == STATE_DEAD {
                // Left by a server that died before it was started, or while it was removed.
                let deleted = self.control.delete(info.dev_id);
                deleted.map_err(|error| failed(&error))?;
            } else {
                ours.insert(info.ublksrv_flags, info);
            }
        }
        // First those that somebody waits for.
        let (old, new): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|entry| ours.contains_key(&mark_of(&entry.id)));
        for entry in old {
            if let Some(info) = ours.remove(&mark_of(&entry.id)) {
                let slot = self.recover(entry, &info);
                self.slots.push(slot);
            }
        }
        for info in ours.values() {
            say(&format!("/dev/ublkb{} is in no list; nobody serves it", info.dev_id));
        }
        for entry in new {
            if entry.wish == Wish::Serve {
                let slot = self.add(entry, options);
                self.slots.push(slot);
            }
        }
        self.take_out();
        self.slots.sort_by(|one, other| one.entry.id.cmp(&other.entry.id));
        for slot in self.slots.iter().filter(|slot| slot.state != "served") {
            say(&format!("volume {}: {}", slot.entry.id, slot.state));
        }
        Ok(())
    }

    /// Takes a device over. It is served in any case.
    fn recover(&mut self, entry: Entry, info: &DeviceInfo) -> Slot {
        let end = Instant::now() + BUSY_PATIENCE;
        let backing = loop {
            match Backing::open(&entry.backing) {
                Err(error) if error.errno == libc::EBUSY && Instant::now() < end => {
                    std::thread::sleep(BUSY_POLL);
                }
                opened => break opened,
            }
        };
        let backing = backing.map_err(|error| error.to_string()).and_then(|backing| {
            let noted = fs::read_to_string(self.note_of(&entry.id)).unwrap_or_default();
            if noted == identity(backing.device()) {
                Ok(backing)
            } else {
                Err(format!("{} is another device than it was", entry.backing.display()))
            }
        });
        let (backing, mut state) = match backing {
            Ok(backing) => (Some(Arc::new(backing)), "served".to_string()),
            Err(why) => (None, format!("every request fails: {why}")),
        };
        let shape = (info.nr_hw_queues, info.queue_depth);
        let volume = match self.volume(&entry, backing, shape, &mut state) {
            Ok(volume) => volume,
            Err(state) => return Slot::without(entry, state, false),
        };
        let served = match Served::recover(&mut self.control, &volume, info, queue_failed) {
            Ok(served) => Some(served),
            Err(error) => {
                state = error.to_string();
                None
            }
        };
        if served.is_some()
            && let Err(error) = self.name(&entry.name, info.dev_id)
        {
            state = format!("served, without a name: {error}");
        }
        let gate = volume.backing.is_some().then_some(volume.gate);
        Slot { entry, gate, log: volume.log, served, state, missing: false }
    }

    fn add(&mut self, entry: Entry, options: Options) -> Slot {
        let backing = match Backing::open(&entry.backing) {
            Ok(backing) => backing,
            Err(error) => {
                let state = error.to_string();
                return Slot::without(entry, state, true);
            }
        };
        let note = identity(backing.device());
        let mut state = "served".to_string();
        let queues =
            options.queues.unwrap_or_else(|| queues_for(&backing, self.control.features()));
        let options = Options { queues: Some(queues), ..options };
        let shape = (queues, DEPTH);
        let volume = match self.volume(&entry, Some(Arc::new(backing)), shape, &mut state) {
            Ok(volume) => volume,
            Err(state) => return Slot::without(entry, state, false),
        };
        let (path, names) = (self.note_of(&entry.id), self.places.dir.join("names"));
        let line = format!("SECONDSITE_NAME={}\n", entry.name);
        // Both are there before the block device is: the next server, and udev, read them.
        let named = move |number: u32| {
            volumes::write_file(&path, note.as_bytes())?;
            volumes::write_file(&names.join(format!("ublkb{number}")), line.as_bytes())
        };
        for folder in ["devices", "names"] {
            if let Err(error) = fs::create_dir_all(self.places.dir.join(folder)) {
                say(&format!("create {folder}: {error}"));
            }
        }
        match Served::add(&mut self.control, &volume, options, queue_failed, named) {
            Ok(served) => {
                if let Err(error) = self.name(&entry.name, served.number) {
                    state = format!("served, without a name: {error}");
                }
                let (gate, log) = (Some(volume.gate), volume.log);
                Slot { entry, gate, log, served: Some(served), state, missing: false }
            }
            Err(error) => Slot::without(entry, error.to_string(), false),
        }
    }

    fn volume(
        &mut self,
        entry: &Entry,
        backing: Option<Arc<Backing>>,
        (queues, depth): (u16, u16),
        state: &mut String,
    ) -> Result<Volume, String> {
        let Some(backing) = backing else {
            // Every request fails before it is looked at.
            let form = form(4096, 4096, 0, 4096);
            let shared = Shared::in_memory(form, &self.group, false, &Shared::heap(&form));
            let gate = Gate::with_bug(Arc::new(shared), queues.into(), depth.into(), self.bug);
            let (id, gate) = (entry.id.clone(), Arc::new(gate));
            return Ok(Volume { id, backing: None, reserve: None, gate, log: None });
        };
        let (shared, reserve, log) = self.shared(entry, &backing, state)?;
        let gate = Gate::with_bug(shared, queues.into(), depth.into(), self.bug);
        let (id, gate, log) = (entry.id.clone(), Arc::new(gate), log.map(Arc::new));
        Ok(Volume { id, backing: Some(backing), reserve, gate, log })
    }

    /// What is shared with the agent: what is there, if it is of this very device; and the volume's
    /// part of the reserve.
    fn shared(
        &mut self,
        entry: &Entry,
        backing: &Arc<Backing>,
        state: &mut String,
    ) -> Result<SharedParts, String> {
        let path = volume_path(&self.places.dir, &entry.id);
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)
            .map_err(|error| format!("create {}: {error}", folder.display()))?;
        let device = backing.device();
        let number = u64::from(device.major) << 20 | u64::from(device.minor);
        let mut form = form(
            device.size_bytes,
            entry.block_bytes,
            number << 32 | device.diskseq & u64::from(u32::MAX),
            self.preserve_bytes,
        );
        let found = Shared::find(&path, form, &self.group);
        // As it was when this boot began with it: a reserve that failed is not used again.
        let usable = found.as_ref().is_none_or(|shared| {
            matches!(shared.reserve(), ReserveState::Spill | ReserveState::Log)
        });
        let mut part = None;
        if let Some(reserve) = entry.reserve.as_ref().filter(|_| usable) {
            match self.part(entry, reserve, device.size_bytes) {
                Ok(found) => part = Some(found),
                Err(why) => *state = format!("{state}, without its reserve: {why}"),
            }
        }
        let adopted = found.is_some();
        form.spill_slots = part.as_ref().map_or(0, |(part, _)| part.spill_slots);
        let shared = match found {
            Some(shared) => shared,
            None => {
                let (shared, _) =
                    Shared::create(&path, form, &self.group).map_err(|error| error.to_string())?;
                // Nothing was let through yet.
                let beside = Beside::open(device).map_err(|error| error.to_string())?;
                beside.rebase(&shared)?;
                shared
            }
        };
        let shared = Arc::new(shared);
        let Some((part, reserve)) = part else {
            if entry.reserve.is_some() {
                shared.reserve_failed();
                // Before a write: at the next boot its log would be believed.
                self.forget_reserve(&entry.id);
            }
            return Ok((shared, None, None));
        };
        if !adopted {
            shared.take_part(&part, Log::is_of_use(backing));
        }
        if shared.reserve() != ReserveState::Log {
            return Ok((shared, Some(reserve), None));
        }
        match Log::open(&part, &reserve, backing, &shared, adopted) {
            Ok(log) => {
                match log.found {
                    Found::Memory => {}
                    Found::Log { in_doubt, dirty } => say(&format!(
                        "volume {}: its log is whole: {in_doubt} blocks are in doubt, and {dirty} \
                         were written and not committed; nothing else is sent",
                        entry.id
                    )),
                    Found::Nothing(why) => {
                        say(&format!("volume {}: all of it is compared: {why}", entry.id));
                    }
                }
                Ok((shared, Some(reserve), Some(log)))
            }
            Err(error) => {
                *state = format!("{state}, without its reserve: {error}");
                shared.reserve_failed();
                shared.marks().set_compare_due(true);
                self.forget_reserve(&entry.id);
                Ok((shared, None, None))
            }
        }
    }

    /// A volume's part of its reserve: what it has there, else a new one.
    fn part(
        &mut self,
        entry: &Entry,
        path: &Path,
        volume_bytes: u64,
    ) -> Result<(Part, Arc<Backing>), String> {
        if !self.reserves.contains_key(path) {
            let end = Instant::now() + RESERVE_PATIENCE;
            let reserve = loop {
                match Reserve::open(path, &self.machine) {
                    // Not there yet, or a server before has not let go of it.
                    Err(error)
                        if (error.errno == libc::EBUSY || !path.exists())
                            && Instant::now() < end =>
                    {
                        std::thread::sleep(BUSY_POLL);
                    }
                    opened => break opened.map_err(|error| error.to_string())?,
                }
            };
            self.reserves.insert(path.to_path_buf(), reserve);
        }
        let reserve = self.reserves.get_mut(path).expect("just opened");
        let part = match reserve.part(&entry.id, volume_bytes, entry.block_bytes) {
            Some(part) => part.clone(),
            None => reserve
                .give(&entry.id, volume_bytes, entry.block_bytes)
                .map_err(|error| error.to_string())?,
        };
        Ok((part, reserve.backing().clone()))
    }

    /// Reserves that have failed since it was looked last: their volumes go on without.
    fn look_at_reserves(&mut self) {
        let mut failed = Vec::new();
        for slot in &mut self.slots {
            let gone = slot.gate.is_some() && slot.reserve() == ReserveState::Failed;
            if gone && let Some(path) = slot.entry.reserve.take() {
                let what = format!("its reserve {} has failed", path.display());
                slot.state = format!("{}, {what}: after a power cut all is compared", slot.state);
                say(&format!("volume {}: {what}", slot.entry.id));
                failed.push(slot.entry.id.clone());
            }
        }
        failed.iter().for_each(|id| self.forget_reserve(id));
    }

    /// Lets go of reserves that no volume has any more.
    fn close_reserves(&mut self) {
        let slots = &self.slots;
        let used =
            |path: &PathBuf| slots.iter().any(|slot| slot.entry.reserve.as_ref() == Some(path));
        self.reserves.retain(|path, _| used(path));
    }

    /// A log that misses writes must not be believed by any later start.
    fn forget_reserve(&self, id: &str) {
        let forgotten = volumes::read(&self.places.list_here()).and_then(|mut entries| {
            let entry = entries.iter_mut().filter(|entry| entry.id == id);
            entry.for_each(|entry| entry.reserve = None);
            self.write(&entries)
        });
        if let Err(why) = forgotten {
            say(&why);
        }
    }

    /// Takes out what shall go and is used by nobody; the rest stays, and says why.
    fn take_out(&mut self) {
        let mut changed = false;
        let mut slots = std::mem::take(&mut self.slots);
        slots.retain_mut(|slot| {
            if slot.entry.wish == Wish::Serve {
                return true;
            }
            changed = true;
            slot.entry.wish = Wish::Serve;
            let Some(served) = &slot.served else { return true };
            let number = served.number;
            let held = match hold(number) {
                Ok(held) => held,
                Err(why) => {
                    slot.state = format!("served, cannot be taken out: {why}");
                    return true;
                }
            };
            let _ = fs::remove_file(Path::new(NAMES).join(&slot.entry.name));
            let _ = fs::remove_file(self.places.dir.join(format!("names/ublkb{number}")));
            drop(held);
            let removed = slot.served.take().map(|served| served.remove(&mut self.control));
            slot.log = None;
            let reserve = slot.entry.reserve.as_ref().and_then(|path| self.reserves.get_mut(path));
            if let Some(Err(error)) = reserve.map(|reserve| reserve.take_back(&slot.entry.id)) {
                say(&format!("volume {}: its part of the reserve stays: {error}", slot.entry.id));
            }
            if let Some(Err(error)) = removed {
                say(&format!("remove /dev/ublkb{number}: {error}"));
            }
            let _ = fs::remove_file(self.note_of(&slot.entry.id));
            false
        });
        self.slots = slots;
        self.close_reserves();
        if changed {
            let entries: Vec<_> = self.slots.iter().map(|slot| slot.entry.clone()).collect();
            if let Err(why) = self.write(&entries) {
                say(&why);
            }
        }
    }

    fn write(&self, entries: &[Entry]) -> Result<(), String> {
        let (list, here) = (&self.places.list, self.places.list_here());
        let folder = list.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)
            .and_then(|()| volumes::write(list, entries))
            .map_err(|error| format!("write {}: {error}", list.display()))?;
        volumes::write(&here, entries).map_err(|error| format!("write {}: {error}", here.display()))
    }

    /// Where it is noted, until the next boot, which device a volume writes to.
    fn note_of(&self, id: &str) -> PathBuf {
        self.places.dir.join("devices").join(id)
    }

    /// Makes the stable name point to the device.
    fn name(&self, name: &str, number: u32) -> io::Result<()> {
        fs::create_dir_all(NAMES)?;
        let (link, new) = (Path::new(NAMES).join(name), Path::new(NAMES).join(format!(".{name}")));
        let to = format!("../ublkb{number}");
        if fs::read_link(&link).is_ok_and(|old| old == Path::new(&to)) {
            return Ok(());
        }
        let _ = fs::remove_file(&new);
        symlink(to, &new)?;
        fs::rename(new, link)
    }

    /// Answers a line; true if the next server has to go on.
    fn answer(&mut self, line: &str) -> (Vec<String>, bool) {
        let words: Vec<_> = line.split_whitespace().collect();
        let one = |text: String| (vec![text], false);
        match words.as_slice() {
            ["hello"] => one(format!("hello {} {}", env!("CARGO_PKG_VERSION"), std::process::id())),
            ["list"] => {
                let mut lines: Vec<_> = self.slots.iter().map(shown).collect();
                lines.push("end".into());
                (lines, false)
            }
            ["add", rest @ ..] => match self.accept(rest) {
                Ok(()) => (vec!["changed".into()], true),
                Err(why) => one(format!("failed {why}")),
            },
            ["remove", id] => match self.let_go(id) {
                Ok(()) => (vec!["changed".into()], true),
                Err(why) => one(format!("failed {why}")),
            },
            ["cut", ids @ ..] => one(match self.cut(ids) {
                Ok(flip) => format!("flipped {flip}"),
                Err(why) => format!("failed {why}"),
            }),
            _ => one("failed not understood".into()),
        }
    }

    /// Cuts these volumes at one instant.
    fn cut(&self, ids: &[&str]) -> Result<u64, String> {
        let mut gates = Vec::with_capacity(ids.len());
        for id in ids {
            let slot = self.slots.iter().find(|slot| slot.entry.id == *id);
            let gate = slot.and_then(|slot| slot.gate.as_ref());
            gates.push(gate.ok_or_else(|| format!("volume {id} is not served"))?.as_ref());
        }
        let flip = Gate::cut(&self.group, gates.iter().copied())
            .map_err(|error: NotCut| error.to_string())?;
        let cut = self.slots.iter().filter(|slot| ids.contains(&slot.entry.id.as_str()));
        cut.filter_map(|slot| slot.log.as_ref()).for_each(|log| log.note());
        Ok(flip)
    }

    /// Takes a new volume into the list, if it can be served.
    fn accept(&mut self, words: &[&str]) -> Result<(), String> {
        let entry = Entry::parse(words)?;
        let mut entries: Vec<_> = self.slots.iter().map(|slot| slot.entry.clone()).collect();
        if entries.len() >= VOLUMES_MAX {
            return Err(format!("there are {VOLUMES_MAX} volumes already"));
        }
        for other in &entries {
            let same = [
                (other.id == entry.id || mark_of(&other.id) == mark_of(&entry.id), "id"),
                (other.name == entry.name, "name"),
                (other.backing == entry.backing, "backing device"),
            ];
            if let Some((_, what)) = same.iter().find(|(same, _)| *same) {
                return Err(format!("volume {} has this {what}", other.id));
            }
        }
        let text = |error: UblkError| error.to_string();
        let backing = Backing::open(&entry.backing).map_err(text)?;
        on_no_filter(&entry.backing, backing.device(), &BTreeSet::new())?;
        if let Some(path) = &entry.reserve {
            if let Some(other) = entries.iter().filter_map(|other| other.reserve.as_ref()).next()
                && other != path
            {
                return Err(format!("the reserve of this server is {}", other.display()));
            }
            let devices = entries.iter().map(|other| &other.backing);
            let mut filtered: BTreeSet<_> = devices
                .filter_map(|path| Device::open(path).ok())
                .map(|device| (device.major, device.minor))
                .collect();
            filtered.insert((backing.device().major, backing.device().minor));
            let device = Device::open(path).map_err(|error| error.to_string())?;
            on_no_filter(path, &device, &filtered)?;
            // What a volume of this name had is nobody's any more.
            let bytes = backing.device().size_bytes;
            let reserve = match self.reserves.entry(path.clone()) {
                btree_map::Entry::Occupied(opened) => opened.into_mut(),
                btree_map::Entry::Vacant(place) => {
                    place.insert(Reserve::open(path, &self.machine).map_err(text)?)
                }
            };
            let given = reserve.give(&entry.id, bytes, entry.block_bytes).map_err(text);
            if given.is_err() {
                self.close_reserves();
            }
            given?;
        }
        entries.push(entry);
        self.write(&entries)
    }

    fn let_go(&mut self, id: &str) -> Result<(), String> {
        let slot = self.slots.iter().find(|slot| slot.entry.id == id);
        let slot = slot.ok_or_else(|| format!("no volume {id}"))?;
        if let Some(served) = &slot.served {
            drop(hold(served.number)?);
        }
        let wish = |entry: &Entry| match (entry.id == id, &slot.served) {
            (false, _) => Some(entry.clone()),
            (true, Some(_)) => Some(Entry { wish: Wish::Remove, ..entry.clone() }),
            (true, None) => None,
        };
        let entries: Vec<_> = self.slots.iter().filter_map(|slot| wish(&slot.entry)).collect();
        self.write(&entries)
    }
}

fn form(volume_bytes: u64, block_bytes: u32, identity: u64, preserve_bytes: u64) -> Form {
    let blocks = volume_bytes.div_ceil(u64::from(block_bytes));
    let most = (preserve_bytes / u64::from(block_bytes)).max(1);
    // Never all of a small volume: that much would not be overwritten before it is read.
    let memory_slots = most.min(blocks.div_ceil(4)) as u32;
    Form { volume_bytes, block_bytes, memory_slots, spill_slots: 0, identity }
}

/// Refuses what lies on a filter, or on what one of ours writes to.
fn on_no_filter(
    path: &Path,
    device: &Device,
    filtered: &BTreeSet<(u32, u32)>,
) -> Result<(), String> {
    for (number, name) in device.lies_on() {
        if name.starts_with("ublkb") || filtered.contains(&number) {
            return Err(format!("{} lies on a filtered device (/dev/{name})", path.display()));
        }
    }
    Ok(())
}

/// A device by what does not change while the machine runs.
fn identity(device: &Device) -> String {
    let disk = format!("{} {}", device.diskseq, device.disk_offset_bytes);
    format!("{}:{} {disk} {}\n", device.major, device.minor, device.size_bytes)
}

/// Holds a filter's block device, if nobody else does.
fn hold(number: u32) -> Result<fs::File, String> {
    let node = node_of(number);
    let opened =
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&node);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => {
            let mounts = Device::open(&node).ok().and_then(|device| device.mounts().ok());
            match mounts.and_then(|mounts| mounts.into_iter().next()) {
                Some(mount) => {
                    format!("{} is mounted on {}", node.display(), mount.path.display())
                }
                None => format!("{} is in use", node.display()),
            }
        }
        _ => format!("hold {}: {error}", node.display()),
    })
}

fn shown(slot: &Slot) -> String {
    let device = match &slot.served {
        Some(served) => node_of(served.number).display().to_string(),
        None => "-".into(),
    };
    let reserve = match slot.reserve() {
        ReserveState::None => "none",
        ReserveState::Spill => "spill",
        ReserveState::Log => "log",
        ReserveState::Failed => "failed",
    };
    format!("volume {} {reserve} {device} {}", slot.entry.words(), slot.state)
}
