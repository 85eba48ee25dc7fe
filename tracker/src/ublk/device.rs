//! A filter as a whole: made anew or taken over, served by its queues, removed.
//!
//! Which devices are ours is the kernel's word, not a file's: each carries a mark in its
//! `ublksrv_flags`, made of the name of its volume. So a server that died between two steps leaves
//! nothing that the next one does not find.

use super::abi::{self, DeviceInfo};
use super::backing::Backing;
use super::control::{Control, ring_refused};
use super::log::Log;
use super::queue::{Parts, Queue};
use super::{UblkError, discard};
use crate::filter::gate::Gate;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Requests that a queue has under way at most, and what each can carry: 16 MiB a queue.
pub const DEPTH: u16 = 64;
const BUFFER_BYTES: u32 = 256 << 10;
/// Queues at most; each is a thread.
const QUEUES_MAX: u16 = 8;
/// How long the last server's requests may take to come back from the backing device.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(600);
/// How long the node of a new device may take to appear.
const NODE_PATIENCE: Duration = Duration::from_secs(10);
const NODE_POLL: Duration = Duration::from_millis(5);
/// Upper half of the mark: "SSf1".
const MARK: u64 = 0x5353_6631 << 32;

/// What a filter is made of.
pub struct Volume {
    /// Its stable id: the same volume has the same one after a restart.
    pub id: String,
    /// What it writes to; none if that cannot be had: then every request fails, as it would below.
    pub backing: Option<Arc<Backing>>,
    /// Where preserved blocks go when memory is full.
    pub reserve: Option<Arc<Backing>>,
    /// Who decides on its writes.
    pub gate: Arc<Gate>,
    /// Makes its marks outlive a reboot.
    pub log: Option<Arc<Log>>,
}

/// How filters are made.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// What was on its way when a server died is issued again. Off only to show what it is for.
    pub reissue: bool,
    /// Queues of a new device; chosen if none.
    pub queues: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { reissue: true, queues: None }
    }
}

/// A filter that is being served by this process.
pub struct Served {
    /// Number of the device: `/dev/ublkbN`.
    pub number: u32,
    character: File,
    threads: Vec<thread::JoinHandle<()>>,
}

/// The mark of a volume's device: its kind, and a hash of its id.
pub fn mark_of(id: &str) -> u64 {
    // FNV-1a; two ids of one server with the same hash are refused when the second is added.
    let hash = id
        .bytes()
        .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    MARK | u64::from(hash)
}

/// Whether a device carries a mark of ours.
pub fn is_ours(info: &DeviceInfo) -> bool {
    info.ublksrv_flags >> 32 == MARK >> 32
}

/// The block device of a filter.
pub fn node_of(number: u32) -> PathBuf {
    format!("/dev/ublkb{number}").into()
}

impl Served {
    /// Makes a new device for `volume` and serves it. `named` is told its number before the block
    /// device appears.
    pub fn add(
        control: &mut Control,
        volume: &Volume,
        options: Options,
        failed: fn(&str),
        named: impl FnOnce(u32) -> io::Result<()>,
    ) -> Result<Self, UblkError> {
        let backing = volume.backing.as_ref().expect("a new filter has a backing device");
        let path = backing.device().path.clone();
        let fails = |what| move |error: io::Error| UblkError::new(what, &path, &error);
        let queues = options.queues.unwrap_or_else(|| queues_for(backing, control.features()));
        let mut flags = abi::F_USER_RECOVERY | abi::F_CMD_IOCTL_ENCODE;
        if options.reissue {
            flags |= abi::F_USER_RECOVERY_REISSUE;
        }
        let prepared = Prepared::start(volume, queues, DEPTH, BUFFER_BYTES, failed)?;
        let info = control
            .add(DeviceInfo {
                nr_hw_queues: queues,
                queue_depth: DEPTH,
                max_io_buf_bytes: BUFFER_BYTES,
                flags,
                ublksrv_flags: mark_of(&volume.id),
                ..Default::default()
            })
            .map_err(fails.clone()("add a ublk device for"))?;
        let number = info.dev_id;
        let made = (|| {
            if (info.nr_hw_queues, info.queue_depth, info.max_io_buf_bytes)
                != (queues, DEPTH, BUFFER_BYTES)
            {
                return Err(io::Error::other(format!("the kernel wants it otherwise: {info:?}")));
            }
            let discard_max = match &volume.log {
                Some(_) => Log::request_bytes_max(backing.device().size_bytes),
                None => u64::MAX,
            };
            control.set_params(number, &backing.params(BUFFER_BYTES, discard_max))?;
            named(number)?;
            volume.gate.take_over();
            let served = prepared.fetch(number)?;
            control.start(number)?;
            Ok(served)
        })();
        made.map_err(|error| {
            // Its threads end when it is stopped; a server that starts anew removes it.
            let _ = control.stop(number);
            fails("start the ublk device for")(error)
        })
    }

    /// Takes over a device whose server is gone; I/O that waited goes on.
    pub fn recover(
        control: &mut Control,
        volume: &Volume,
        info: &DeviceInfo,
        failed: fn(&str),
    ) -> Result<Self, UblkError> {
        let number = info.dev_id;
        let node = node_of(number);
        let fails = |what| move |error: io::Error| UblkError::new(what, &node, &error);
        let prepared = Prepared::start(
            volume,
            info.nr_hw_queues,
            info.queue_depth,
            info.max_io_buf_bytes,
            failed,
        )?;
        control.start_recovery(number, TAKE_OVER_PATIENCE).map_err(fails.clone()("take over"))?;
        // Nothing that the server before had submitted is on its way any more.
        volume.gate.take_over();
        let served = prepared.fetch(number).map_err(fails.clone()("serve"))?;
        control.end_recovery(number).map_err(fails("go on with"))?;
        Ok(served)
    }

    /// Takes the device away and waits until nothing is left of it. The caller holds the block
    /// device exclusively, or knows that nobody uses it: what is not answered by now fails.
    pub fn remove(self, control: &mut Control) -> io::Result<()> {
        control.stop(self.number)?;
        for thread in self.threads {
            // It has ended, or ended the process.
            let _ = thread.join();
        }
        drop(self.character);
        control.delete(self.number)
    }
}

/// One queue where a server that dies while it takes a device over could harm the kernel: before
/// 6.17 it forgets a queue at the beginning and would forget it again, though it is not there. A
/// device with one queue is not touched a second time then.
pub fn queues_for(backing: &Backing, features: u64) -> u16 {
    if features & abi::F_BUF_REG_OFF_DAEMON == 0 {
        return 1;
    }
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() as u16);
    backing.hardware_queues().unwrap_or(cpus).min(cpus).clamp(1, QUEUES_MAX)
}

/// Threads that have all they need and wait for the device.
struct Prepared {
    threads: Vec<(thread::JoinHandle<()>, mpsc::Sender<Arc<File>>)>,
    answers: mpsc::Receiver<io::Result<()>>,
}

impl Prepared {
    fn start(
        volume: &Volume,
        queues: u16,
        depth: u16,
        buffer_bytes: u32,
        failed: fn(&str),
    ) -> Result<Self, UblkError> {
        let subject = match &volume.backing {
            Some(backing) => backing.device().path.clone(),
            None => PathBuf::from(&volume.id),
        };
        let (answer, answers) = mpsc::channel();
        let begun = (|| -> io::Result<_> {
            let events: Result<Vec<_>, _> =
                (0..queues).map(|_| EventFd::from_flags(EfdFlags::EFD_CLOEXEC)).collect();
            let events: Arc<[EventFd]> = events?.into();
            if let Some(log) = &volume.log {
                log.start(events.clone())?;
            }
            let mut threads = Vec::new();
            for qid in 0..queues {
                let parts = Parts {
                    qid,
                    depth,
                    buffer_bytes,
                    backing: volume.backing.clone(),
                    reserve: volume.reserve.clone(),
                    gate: volume.gate.clone(),
                    log: volume.log.clone(),
                    events: events.clone(),
                };
                let (give, take) = mpsc::channel();
                let answer = answer.clone();
                let thread = thread::Builder::new()
                    .name(format!("queue{qid}"))
                    .stack_size(discard::STACK_BYTES)
                    .spawn(move || serve(parts, &take, &answer, failed))?;
                threads.push((thread, give));
            }
            Ok(threads)
        })();
        let threads = begun.map_err(|error| UblkError::new("prepare", &subject, &error))?;
        let prepared = Self { threads, answers };
        prepared.all_answered().map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => ring_refused(&subject, &error),
            _ => UblkError::new("prepare", &subject, &error),
        })?;
        Ok(prepared)
    }

    fn all_answered(&self) -> io::Result<()> {
        for _ in &self.threads {
            match self.answers.recv() {
                Ok(answer) => answer?,
                Err(_) => return Err(io::Error::other("a thread ended")),
            }
        }
        Ok(())
    }

    /// Opens the character device and asks for requests on every queue.
    fn fetch(self, number: u32) -> io::Result<Served> {
        let path = format!("/dev/ublkc{number}");
        let end = Instant::now() + NODE_PATIENCE;
        let character = loop {
            let opened =
                OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path);
            match opened {
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY))
                        && Instant::now() < end =>
                {
                    thread::sleep(NODE_POLL);
                }
                opened => break opened?,
            }
        };
        let shared = Arc::new(character);
        for (_, give) in &self.threads {
            if give.send(shared.clone()).is_err() {
                return Err(io::Error::other("a thread ended"));
            }
        }
        self.all_answered()?;
        let threads = self.threads.into_iter().map(|(thread, _)| thread).collect();
        // The rings hold the device; this one is for its removal.
        let character = shared.try_clone()?;
        Ok(Served { number, character, threads })
    }
}

/// A queue's thread. `failed` ends the process: a queue that is not served is worse than a server
/// that starts anew.
fn serve(
    parts: Parts,
    take: &mpsc::Receiver<Arc<File>>,
    answer: &mpsc::Sender<io::Result<()>>,
    failed: fn(&str),
) {
    // Nobody listens any more: the start was given up.
    let tell = |result| drop(answer.send(result));
    let mut queue = match Queue::prepare(parts) {
        Ok(queue) => queue,
        Err(error) => return tell(Err(error)),
    };
    tell(Ok(()));
    let Ok(character) = take.recv() else { return };
    match queue.fetch(&character) {
        Ok(()) => {}
        Err(error) => return tell(Err(error)),
    }
    drop(character);
    tell(Ok(()));
    if let Err(error) = queue.run() {
        failed(&error.to_string());
    }
}
