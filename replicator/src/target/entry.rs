//! One volume as a site knows it: what it should be, whether it is open, and whose turn it is.
//!
//! Invariants: at most one session sits at a volume; a newcomer ends it and waits until it has
//! left, so that no two sessions ever receive for one volume; of several newcomers the last wins.

use super::keeper::{Keeper, VolumeSpec};
use super::replica;
use super::session::SessionHandle;
use super::volume::refuse;
use crate::pulse;
use secondsite_control::api::TargetVolumeReport;
use secondsite_format::ids::VolumeId;
use secondsite_format::message::{Hello, Refusal, RefusalCode};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Whether a volume can be used.
pub enum Opened {
    /// Its journal is being checked.
    Pending,
    /// It can.
    Open(Arc<Keeper>),
    /// It cannot, and why.
    Failed(String),
}

#[derive(Default)]
struct Seats {
    session: Option<(Arc<SessionHandle>, Hello)>,
    newest: u64,
}

/// See the module.
pub struct Entry {
    /// Where the replica volume is if it is a file.
    replica_file: PathBuf,
    spec: Mutex<Option<VolumeSpec>>,
    opened: Mutex<Opened>,
    refused: Mutex<Option<String>>,
    seats: Mutex<Seats>,
    left: Condvar,
    /// Counted for metrics.
    pub(super) counts: Counts,
}

/// What happened to a volume since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Epochs committed.
    pub commits: AtomicU64,
    /// Promotions into the replica volume.
    pub promotions: AtomicU64,
    /// Bytes of frames received.
    pub received_bytes: AtomicU64,
}

/// A newcomer's place among those that want the seat.
#[derive(Debug, Clone, Copy)]
pub struct Ticket(u64);

/// A session's right to the volume; given up when dropped.
pub struct Seat {
    /// The volume.
    pub keeper: Arc<Keeper>,
    entry: Arc<Entry>,
}

impl Entry {
    /// A volume that is not open yet, and its folder.
    pub fn new(folder: &Path) -> Self {
        Self {
            replica_file: folder.join(replica::FILE),
            spec: Mutex::default(),
            opened: Mutex::new(Opened::Pending),
            refused: Mutex::default(),
            seats: Mutex::default(),
            left: Condvar::new(),
            counts: Counts::default(),
        }
    }

    /// What the assignment says; whether the volume is to be opened now.
    pub fn set_spec(&self, spec: VolumeSpec) -> bool {
        let mut known = lock(&self.spec);
        let differs = known.as_ref() != Some(&spec);
        *known = Some(spec);
        differs && !matches!(*lock(&self.opened), Opened::Open(_))
    }

    /// What the assignment said last.
    pub fn spec(&self) -> Option<VolumeSpec> {
        lock(&self.spec).clone()
    }

    /// It is open, or cannot be. Whether that is news.
    pub fn set_opened(&self, opened: Opened) -> bool {
        let mut known = lock(&self.opened);
        let same = matches!(
            (&*known, &opened), (Opened::Failed(before), Opened::Failed(now)) if before == now
        );
        *known = opened;
        !same
    }

    /// The open volume.
    pub fn keeper(&self) -> Option<Arc<Keeper>> {
        match &*lock(&self.opened) {
            Opened::Open(keeper) => Some(keeper.clone()),
            Opened::Pending | Opened::Failed(_) => None,
        }
    }

    /// Size of the newest durable state, and block size.
    pub fn size(&self) -> Option<(u64, u32)> {
        let keeper = self.keeper()?;
        let volume = keeper.volume();
        Some((volume.durable_bytes(), volume.record().block_bytes))
    }

    /// The last refusal, or none if a session was welcomed since.
    pub fn note_refused(&self, message: Option<String>) {
        *lock(&self.refused) = message;
    }

    /// The session at the volume, and what it said of itself.
    pub fn session(&self) -> Option<(Arc<SessionHandle>, Hello)> {
        lock(&self.seats).session.clone()
    }

    /// The open volume, or why no session can have it.
    fn usable(&self) -> Result<Arc<Keeper>, Refusal> {
        match &*lock(&self.opened) {
            Opened::Open(keeper) => Ok(keeper.clone()),
            Opened::Failed(why) => Err(refuse(RefusalCode::Storage, why.clone())),
            Opened::Pending => {
                let message = "the volume's journal is still being checked after a start";
                Err(refuse(RefusalCode::Storage, message))
            }
        }
    }

    /// A session wants the seat: from now on it is the newest.
    pub fn ask_seat(&self) -> Result<Ticket, Refusal> {
        self.usable()?;
        let mut seats = lock(&self.seats);
        seats.newest += 1;
        self.left.notify_all(); // others that wait see that they are not the newest any more
        Ok(Ticket(seats.newest))
    }

    /// The seat, or none as long as an older session has it, which is told to end.
    pub fn seat(
        self: &Arc<Self>,
        ticket: Ticket,
        handle: &Arc<SessionHandle>,
        hello: &Hello,
    ) -> Result<Option<Seat>, Refusal> {
        let keeper = self.usable()?;
        let replaced = || refuse(RefusalCode::Replaced, "a newer session of the volume took over");
        let mut seats = lock(&self.seats);
        if seats.newest != ticket.0 {
            return Err(replaced());
        }
        if let Some((older, _)) = &seats.session {
            older.end(replaced());
            return Ok(None);
        }
        seats.session = Some((handle.clone(), hello.clone()));
        drop(seats);
        Ok(Some(Seat { keeper, entry: self.clone() }))
    }

    /// Waits until the older session has left or a newer one asks, at most so long; then the older
    /// one is cut off.
    pub fn wait_seat(&self, ticket: Ticket, limit: Duration) {
        let ours = |seats: &mut Seats| seats.newest == ticket.0 && seats.session.is_some();
        let wait = || self.left.wait_timeout_while(lock(&self.seats), limit, ours);
        let (seats, waited) =
            pulse::resting(limit, wait).expect("nothing panics while it holds the seats");
        if waited.timed_out()
            && let Some((older, _)) = &seats.session
        {
            older.cut();
        }
    }

    /// The row of the report.
    pub fn report(&self, id: VolumeId) -> TargetVolumeReport {
        let mut report = TargetVolumeReport {
            id: id.to_string(),
            connected: self.session().is_some(),
            copied: false,
            generation: 0,
            epoch: None,
            promoted_epoch: None,
            replica: String::new(),
            journal_bytes: 0,
            error: None,
            refused: lock(&self.refused).clone(),
        };
        match &*lock(&self.opened) {
            Opened::Pending => {}
            Opened::Failed(why) => report.error = Some(why.clone()),
            Opened::Open(keeper) => {
                report.replica = keeper.replica.path.display().to_string();
                let volume = keeper.volume();
                report.copied = volume.copied();
                report.generation = volume.record().generation.0;
                report.epoch = volume.durable().map(|facts| facts.epoch.0);
                report.promoted_epoch = volume.record().base.as_ref().map(|base| base.epoch.0);
                report.journal_bytes = volume.journal_bytes();
                report.error = volume.stopped().map(str::to_owned);
            }
        }
        if report.replica.is_empty()
            && let Some(spec) = self.spec()
        {
            let path = spec.device.as_ref().unwrap_or(&self.replica_file);
            report.replica = path.display().to_string();
        }
        report
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.entry.seats).session = None;
        self.entry.left.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds a volume's entry")
}
