//! The write-intent log of one volume at work: two threads that do what [`crate::filter::intent`]
//! says, and what a start finds.
//!
//! One makes records durable, the other lets regions leave and keeps the bitmap on disk small. Both
//! use calls that wait; the descriptors of the process stay open meanwhile, the character device
//! among them, so nobody takes the device over while a write of a dead server may still land.
//!
//! When the reserve fails there is no log any more: whoever waits goes, and the records are made
//! void as far as the reserve still takes that. Where it does not, a later commit does: the target
//! then has a cut that the log has never heard of, which means compare.

use super::backing::Backing;
use super::memory::Mapping;
use super::reserve::read;
use super::{UblkError, discard};
use crate::filter::intent::{
    ACTIVE_MAX, BATCH, Entry, Intent, Io, RECORD, REGION_BYTES, places_for, regions_of,
    request_bytes_max,
};
use crate::filter::reserve::{
    NotedCut, PAGE_BYTES, Part, Places, Record, bits_are_whole, seal_bits,
};
use crate::filter::shared::{DEPTH_MAX, LANES_MAX, ReserveState, Shared};
use crate::header::{CutSlot, State as CutState};
use crate::marks::BlockRun;
use crate::splice::beside::Written;
use nix::sys::eventfd::EventFd;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked for a cut, or a compare that is due, without being told.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often the bitmap on disk is rid of what was committed.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Pages of the bitmap that are written at a time.
const PAGES_AT_ONCE: usize = 128;
const _: () = assert!(PAGES_AT_ONCE > ACTIVE_MAX / 4, "leaving regions leave room for others");

/// What a start found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The machine ran on: all marks are in memory.
    Memory,
    /// The log: so many blocks of active regions, and so many that were dirty.
    Log {
        /// Blocks of active regions: all of them count as written.
        in_doubt: u64,
        /// Blocks that were written and not committed.
        dirty: u64,
    },
    /// Nothing to go by: source and target are compared. Why.
    Nothing(&'static str),
}

/// The log of a volume.
pub struct Log {
    inner: Arc<Inner>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
    /// What was found when it was opened.
    pub found: Found,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    shared: Arc<Shared>,
    reserve: Arc<Backing>,
    backing: Arc<Backing>,
    start: u64,
    places: Places,
    identity: u64,
    events: OnceLock<Arc<[EventFd]>>,
}

struct State {
    intent: Intent,
    /// The record that is written next, or was written last.
    record: Record,
    /// What the newest durable record says besides its regions.
    noted: Option<(NotedCut, bool)>,
    kicked: bool,
    over: bool,
}

impl Log {
    /// Whether there can be one: a log is of use where the filter is there before anybody writes,
    /// which is not so under a volume that it is put under while that is in use.
    pub fn is_of_use(backing: &Backing) -> bool {
        let name = std::fs::read_to_string(backing.device().sysfs().join("dm/name"));
        !name.is_ok_and(|name| crate::splice::is_below(name.trim().as_ref()))
    }

    /// The longest discard of a volume with a log, bytes.
    pub fn request_bytes_max(volume_bytes: u64) -> u64 {
        request_bytes_max(places_for(volume_bytes))
    }

    /// Opens the log in this part. `adopted`: the memory is of this boot, and its marks are whole.
    /// Else what is on the reserve is taken into the memory, if it can be believed. Before the
    /// first write is let through.
    pub fn open(
        part: &Part,
        reserve: &Arc<Backing>,
        backing: &Arc<Backing>,
        shared: &Arc<Shared>,
        adopted: bool,
    ) -> Result<Self, UblkError> {
        let fails = |what| {
            let path = reserve.device().path.clone();
            move |error: io::Error| UblkError::new(what, &path, &error)
        };
        let pages = read(reserve, part.start, 2 * PAGE_BYTES).map_err(fails("read the log on"))?;
        let record = Record::decode(&pages);
        // Of a device that cannot be told from others nothing is believed.
        let identity = backing.device().hardware();
        let (found, active) = match (&record, adopted) {
            (Ok(record), true) if !record.void => (Found::Memory, record.regions.clone()),
            (_, true) => {
                let cause = "the log of a volume in use cannot be read";
                return Err(UblkError::new(
                    "use",
                    &reserve.device().path,
                    &io::Error::other(cause),
                ));
            }
            (Ok(record), false) => match believable(record, identity, backing) {
                Ok(()) => {
                    let found = restore(record, part, reserve, shared)
                        .map_err(fails("read the bitmap on"))?;
                    (found, record.regions.clone())
                }
                Err(why) => (Found::Nothing(why), Vec::new()),
            },
            (Err(_), false) => (Found::Nothing("there is no log of it"), Vec::new()),
        };
        if let Found::Nothing(_) = found {
            // The bitmap on disk is of another time: all of it is written anew.
            shared.marked_beside();
        }
        // What was written before this is durable below before anything is called clean.
        backing.flush().map_err(fails("flush the device behind"))?;
        let places = places_for(part.volume_bytes);
        let mut record = Record {
            number: record.as_ref().map_or(0, |record| record.number),
            identity: identity.unwrap_or(0),
            regions: active.clone(),
            ..Record::default()
        };
        record.regions.reserve(places.max(active.len()));
        let inner = Inner {
            state: Mutex::new(State {
                intent: Intent::new(places, LANES_MAX * DEPTH_MAX, &active, None),
                record,
                noted: None,
                kicked: true,
                over: false,
            }),
            changed: Condvar::new(),
            shared: shared.clone(),
            reserve: reserve.clone(),
            backing: backing.clone(),
            start: part.start,
            places: part.places(),
            identity: identity.unwrap_or(0),
            events: OnceLock::new(),
        };
        // Once more, and flushed: what was read may not be durable.
        let mut page = Mapping::anonymous(PAGE_BYTES).map_err(fails("log on"))?;
        let mut state = inner.lock();
        inner.compose(&mut state, &mut page);
        let (number, noted) = (state.record.number, state.noted);
        drop(state);
        inner.write_record(&page, number).map_err(fails("write the log on"))?;
        inner.set_noted(noted);
        Ok(Self { inner: Arc::new(inner), threads: Mutex::default(), found })
    }

    /// Starts its threads; those that wait are woken by these events, one a lane.
    pub(super) fn start(&self, events: Arc<[EventFd]>) -> io::Result<()> {
        let _ = self.inner.events.set(events);
        let record_page = Mapping::anonymous(PAGE_BYTES)?;
        let bitmap_pages = Mapping::anonymous(PAGES_AT_ONCE * PAGE_BYTES)?;
        let builder =
            |name: &str| thread::Builder::new().name(name.into()).stack_size(discard::STACK_BYTES);
        let (one, other) = (self.inner.clone(), self.inner.clone());
        let threads = [
            builder("log").spawn(move || one.keep_records(record_page))?,
            builder("bitmap").spawn(move || other.keep_bitmap(bitmap_pages))?,
        ];
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).extend(threads);
        Ok(())
    }

    /// A write of these bytes comes, or is tried again: whether it may go on now. Else its lane is
    /// woken.
    pub(super) fn enter(&self, lane: usize, tag: u16, bytes: &Range<u64>) -> bool {
        let mut state = self.inner.lock();
        let entry = state.intent.enter(request(lane, tag), regions_of(bytes));
        drop(state);
        if entry == Entry::Wait {
            self.inner.changed.notify_all();
        }
        entry == Entry::Go
    }

    /// It is done, and marked.
    pub(super) fn leave(&self, lane: usize, tag: u16) {
        let mut state = self.inner.lock();
        state.intent.leave(request(lane, tag));
        let waits = state.intent.has_queue();
        drop(state);
        if waits {
            self.inner.changed.notify_all();
        }
    }

    /// A cut was made: the log is to know of it soon.
    pub fn note(&self) {
        self.inner.lock().kicked = true;
        self.inner.changed.notify_all();
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.inner.lock().over = true;
        self.inner.changed.notify_all();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It ends by itself, and cannot panic.
            let _ = thread.join();
        }
    }
}

fn request(lane: usize, tag: u16) -> usize {
    lane * DEPTH_MAX + usize::from(tag)
}

/// Whether a log says what may have changed since the target had the volume.
fn believable(
    record: &Record,
    identity: Option<u64>,
    backing: &Backing,
) -> Result<(), &'static str> {
    // Nobody else holds it now; somebody may have before.
    let written = Written::since_boot(backing.device()).and_then(|written| written.sectors());
    match () {
        () if record.void => Err("its log was given up"),
        () if record.compare_due => Err("a compare was due"),
        () if identity.is_none() => Err("nothing tells its device from others"),
        () if identity != Some(record.identity) => Err("its log is of another device"),
        () if !matches!(written, Ok(0)) => Err("it was written to before its filter was there"),
        () => Ok(()),
    }
}

/// Takes what is on the reserve into new memory.
fn restore(record: &Record, part: &Part, reserve: &Backing, shared: &Shared) -> io::Result<Found> {
    let (marks, places) = (shared.marks(), part.places());
    let block = u64::from(part.block_bytes);
    let region_blocks = REGION_BYTES / block;
    let page_blocks = places.page_regions * region_blocks;
    let (mut in_doubt, mut dirty) = (0, 0);
    let mut doubt = |run: BlockRun| {
        marks.mark(run);
        in_doubt += run.count.min(marks.blocks().saturating_sub(run.first));
    };
    for region in &record.regions {
        doubt(BlockRun { first: u64::from(*region) * region_blocks, count: region_blocks });
    }
    for page in 0..places.pages {
        let at = part.start + places.bitmap + page * PAGE_BYTES as u64;
        let bits = read(reserve, at, PAGE_BYTES)?;
        let first = page * page_blocks;
        if !bits_are_whole(&bits, page) {
            // Torn when the power went, or damaged: nothing is known of its regions.
            doubt(BlockRun { first, count: page_blocks });
            continue;
        }
        for (at, byte) in bits[..page_blocks.div_ceil(8) as usize].iter().enumerate() {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                marks.mark(BlockRun { first: first + at as u64 * 8 + bit, count: 1 });
                dirty += 1;
            }
        }
    }
    // The cut that stood lost what was read for it. If the target has it all the same, only its
    // number counts: what it holds is dirty here.
    let NotedCut { cut, stood, acknowledged } = record.cut;
    let state = match (cut.0, stood) {
        (0, _) => CutState::None,
        (_, true) => CutState::GivenUp,
        (_, false) => CutState::Committed,
    };
    let header = marks.header();
    header.set_cut(CutSlot { epoch: cut.0, cut_id: cut.1, state, acknowledged });
    header.set_compare_due(false);
    Ok(Found::Log { in_doubt, dirty })
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a record says besides its regions.
    fn note(&self) -> (NotedCut, bool) {
        let header = self.shared.marks().header();
        // Before what makes it true: see `Shared::marked_beside`.
        let due = header.compare_due() || self.shared.unnoted_marks().is_some();
        let cut = header.cut();
        let stood = cut.state == CutState::Stands;
        let cut = NotedCut {
            cut: (cut.epoch, cut.cut_id),
            // Given up, too: the target may have it.
            stood: stood || cut.state == CutState::GivenUp,
            acknowledged: cut.acknowledged,
        };
        (cut, due)
    }

    /// Composes the next record.
    fn compose(&self, state: &mut State, page: &mut Mapping) {
        state.intent.begin_record();
        let (cut, compare_due) = self.note();
        let record = &mut state.record;
        record.number += 1;
        (record.cut, record.compare_due, record.identity) = (cut, compare_due, self.identity);
        record.regions.clear();
        record.regions.extend(state.intent.listed());
        record.regions.sort_unstable();
        record.encode(&mut page.bytes_mut()[..PAGE_BYTES]);
        state.noted = Some((cut, compare_due));
        // Whoever was let in before the first is nobody.
        if self.events.get().is_none() {
            state.intent.recorded(|_| {});
        }
    }

    fn write_record(&self, page: &Mapping, number: u64) -> io::Result<()> {
        for step in RECORD {
            match step {
                Io::WriteRecord => {
                    let at = self.start + number % 2 * PAGE_BYTES as u64;
                    self.reserve.write_pages(page, PAGE_BYTES, at)?;
                }
                _ => self.reserve.flush()?,
            }
        }
        Ok(())
    }

    fn set_noted(&self, noted: Option<(NotedCut, bool)>) {
        if let Some((cut, _)) = noted {
            self.shared.set_noted(cut.cut.1);
        }
    }

    fn keep_records(&self, mut page: Mapping) {
        let mut state = self.lock();
        loop {
            if state.over {
                return;
            }
            if self.shared.reserve() == ReserveState::Failed || state.intent.has_failed() {
                return self.fail(state);
            }
            state.kicked = false;
            let news = state.noted != Some(self.note());
            if !(state.intent.wants_record() || news) {
                let slept = self.changed.wait_timeout_while(state, LOOK_EVERY, |state| {
                    !(state.over || state.kicked || state.intent.wants_record())
                });
                state = slept.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            self.compose(&mut state, &mut page);
            let (number, noted) = (state.record.number, state.noted);
            drop(state);
            let written = self.write_record(&page, number);
            state = self.lock();
            if written.is_err() {
                return self.fail(state);
            }
            self.set_noted(noted);
            let mut lanes = 0u64;
            state.intent.recorded(|request| lanes |= 1 << (request / DEPTH_MAX));
            self.wake(lanes);
            // There are fewer places now.
            self.changed.notify_all();
        }
    }

    fn keep_bitmap(&self, mut buffer: Mapping) {
        let mut pages: Vec<u64> = Vec::with_capacity(PAGES_AT_ONCE);
        // Pages that may have a bit on disk that is in memory no more: all of them, until known.
        let mut stale = vec![true; self.places.pages as usize];
        let (mut swept, mut swept_at) = (None, Instant::now());
        let mut sweep_from = None;
        let mut state = self.lock();
        loop {
            if state.over || state.intent.has_failed() {
                return;
            }
            let unnoted = self.shared.unnoted_marks();
            let acknowledged = self.shared.marks().acknowledged();
            if sweep_from.is_none()
                && swept_at.elapsed() >= SWEEP_EVERY
                && swept != Some(acknowledged)
            {
                (sweep_from, swept, swept_at) = (Some(0), Some(acknowledged), Instant::now());
            }
            if let Some(up_to) = unnoted {
                drop(state);
                let all = self.rewrite(&mut buffer, &mut pages, &mut stale);
                state = self.lock();
                if all.is_err() {
                    return self.fail(state);
                }
                self.shared.set_noted_marks(up_to);
                state.kicked = true;
                self.changed.notify_all();
                continue;
            }
            if !state.intent.wants_batch() && sweep_from.is_none() {
                let slept = self.changed.wait_timeout_while(state, LOOK_EVERY, |state| {
                    !(state.over || state.intent.has_failed() || state.intent.wants_batch())
                });
                state = slept.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.intent.begin_batch();
            pages.clear();
            pages.extend(
                state.intent.leaving().map(|region| u64::from(region) / self.places.page_regions),
            );
            pages.sort_unstable();
            pages.dedup();
            let leaves = !pages.is_empty();
            if let Some(from) = sweep_from {
                let end = stale.len();
                let more = (from..end).filter(|page| stale[*page]).map(|page| page as u64);
                let room = PAGES_AT_ONCE - pages.len();
                let before = pages.len();
                pages.extend(more.take(room));
                sweep_from = (pages.len() == before + room)
                    .then(|| pages.last().map_or(end, |page| *page as usize + 1))
                    .filter(|next| *next < end);
            }
            drop(state);
            let done = self.write_pages(&mut buffer, &pages, leaves, &mut stale);
            state = self.lock();
            if done.is_err() {
                return self.fail(state);
            }
            state.intent.batched();
            self.changed.notify_all();
        }
    }

    /// All pages, as memory has them now.
    fn rewrite(
        &self,
        buffer: &mut Mapping,
        pages: &mut Vec<u64>,
        stale: &mut [bool],
    ) -> io::Result<()> {
        for from in (0..self.places.pages).step_by(PAGES_AT_ONCE) {
            pages.clear();
            pages.extend(from..(from + PAGES_AT_ONCE as u64).min(self.places.pages));
            self.write_pages(buffer, pages, true, stale)?;
        }
        Ok(())
    }

    fn write_pages(
        &self,
        buffer: &mut Mapping,
        pages: &[u64],
        leaves: bool,
        stale: &mut [bool],
    ) -> io::Result<()> {
        let block = u64::from(self.shared.form().block_bytes);
        let page_words = (self.places.page_regions * (REGION_BYTES / block) / 64) as usize;
        for step in BATCH {
            match step {
                Io::Capture => {
                    let all = buffer.bytes_mut();
                    for (place, page) in all.chunks_exact_mut(PAGE_BYTES).zip(pages) {
                        place.fill(0);
                        let words = &mut place[..page_words * 8];
                        self.shared.marks().words(*page as usize * page_words, words);
                        stale[*page as usize] = words.iter().any(|byte| *byte != 0);
                        seal_bits(place, *page);
                    }
                }
                Io::FlushBacking if leaves => self.backing.flush()?,
                Io::WritePages => {
                    for (index, page) in pages.iter().enumerate() {
                        let at = self.start + self.places.bitmap + page * PAGE_BYTES as u64;
                        self.reserve.write_part(buffer, index * PAGE_BYTES, PAGE_BYTES, at)?;
                    }
                }
                Io::FlushReserve => self.reserve.flush()?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The reserve has failed. Those that wait go at once; they are in memory.
    fn fail(&self, mut state: MutexGuard<'_, State>) {
        self.shared.reserve_failed();
        let mut lanes = 0u64;
        state.intent.fail(|request| lanes |= 1 << (request / DEPTH_MAX));
        let number = state.record.number;
        drop(state);
        self.wake(lanes);
        self.changed.notify_all();
        // As far as it still takes anything: what stands there is not to be believed.
        let Ok(mut page) = Mapping::anonymous(PAGE_BYTES) else { return };
        for number in [number + 1, number + 2] {
            let record =
                Record { number, void: true, identity: self.identity, ..Record::default() };
            record.encode(&mut page.bytes_mut()[..PAGE_BYTES]);
            let at = self.start + number % 2 * PAGE_BYTES as u64;
            let _ = self.reserve.write_pages(&page, PAGE_BYTES, at);
        }
        let _ = self.reserve.flush();
    }

    fn wake(&self, lanes: u64) {
        let Some(events) = self.events.get() else { return };
        for (lane, event) in events.iter().enumerate() {
            if lanes >> lane & 1 == 1 {
                let _ = event.write(1);
            }
        }
    }
}
