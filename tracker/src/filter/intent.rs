//! The write-intent log of one volume, as a pure state machine: which regions must be known on the
//! reserve to be written to before a write may go down, and when one may leave.
//!
//! After a power cut the regions that the log lists are in doubt as a whole, and of all others the
//! bitmap on disk says what was written and not committed. Invariants:
//! - A write goes down only while the newest durable record, and each that is on its way, lists all
//!   of its regions. It takes all of them at once, or waits and holds none.
//! - A region is left out of a record only after its dirty bits were captured with no write in
//!   flight on it, the backing device was flushed after that, the bits became durable after that,
//!   and no write has entered the region since the capture.
//! - The bits of a region that is not listed are replaced on the reserve by what is in memory. So a
//!   bit goes only when the target has committed what it stood for (it is in none of the bitmaps),
//!   and what was written is durable below: it was flushed before the region left the list.
//!
//! What waits here waits for the reserve, for a flush below, or for writes that were let through;
//! those have passed, so they wait for nothing in here, and nobody waits for them in a circle.
//! Those that wait go first come, first served; nothing overtakes one that starves.
//!
//! Two processes of I/O run side by side, each a fixed sequence ([`RECORD`], [`BATCH`]): records,
//! which let writes in, and batches, which let regions out. Nothing is allocated after the start.

use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of a region.
pub const REGION_BYTES: u64 = 4 << 20;
/// Regions that are active at most: 1 GiB.
pub const ACTIVE_MAX: usize = 256;
const ACTIVE_MIN: usize = 8;
/// Regions of one request at most; a longer discard is split by the kernel.
const REQUEST_MAX: usize = 16;

/// How a record becomes durable, after [`Intent::begin_record`] and before [`Intent::recorded`].
pub const RECORD: [Io; 2] = [Io::WriteRecord, Io::FlushReserve];
/// What comes between [`Intent::begin_batch`] and [`Intent::batched`].
pub const BATCH: [Io; 4] = [Io::Capture, Io::FlushBacking, Io::WritePages, Io::FlushReserve];

/// One step of I/O. The next one begins when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    /// A record with all that [`Intent::listed`] says when the sequence begins.
    WriteRecord,
    /// The reserve is flushed.
    FlushReserve,
    /// The bits in memory (live, cut and taken) of the pages of the regions that leave.
    Capture,
    /// The backing device is flushed; needed if a region is leaving.
    FlushBacking,
    /// The captured pages go to the bitmap on disk.
    WritePages,
}

/// Whether a write may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// All of its regions are listed.
    Go,
    /// It is let in by a later [`Intent::recorded`].
    Wait,
}

/// Known mistakes, for the test that must notice them.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A region that a write enters while it leaves goes all the same.
    LeaveAnyway,
    /// A region with writes in flight leaves.
    LeaveInFlight,
    /// A region is left out as soon as its batch begins.
    LeaveEarly,
    /// A write takes what regions it can, and waits for the others.
    HoldSome,
}

/// Regions of a volume that may be active at once: a sixteenth of it, within bounds.
pub fn places_for(volume_bytes: u64) -> usize {
    let regions = volume_bytes.div_ceil(REGION_BYTES) as usize;
    (regions / 16).clamp(ACTIVE_MIN, ACTIVE_MAX)
}

/// The longest request with so many places, bytes.
pub fn request_bytes_max(places: usize) -> u64 {
    ((places / 2).min(REQUEST_MAX) as u64 - 1) * REGION_BYTES
}

/// The regions of these bytes.
pub fn regions_of(bytes: &Range<u64>) -> Range<u32> {
    let first = bytes.start / REGION_BYTES;
    first as u32..bytes.end.div_ceil(REGION_BYTES).max(first + 1) as u32
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing.
    Free,
    /// The record on its way is the first that lists it.
    Joining,
    /// Listed.
    Active,
    /// Listed, and in the batch on its way; no write has entered since the capture.
    Leaving,
    /// Listed, and need not be in the next record; no write has entered since the capture.
    Left,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    region: u32,
    stage: Stage,
    /// In flight.
    writes: u32,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Nothing,
    Waits,
    Regions,
}

#[derive(Debug, Clone, Copy)]
struct Request {
    first: u32,
    end: u32,
    held: Held,
}

/// See the module.
#[derive(Debug)]
pub struct Intent {
    places: Box<[Place]>,
    requests: Box<[Request]>,
    queue: VecDeque<usize>,
    /// How many of the queue the record on its way is for.
    composed: usize,
    time: u64,
    recording: bool,
    batching: bool,
    failed: bool,
    bug: Option<Bug>,
}

impl Intent {
    /// With this many places and numbers of requests; `active`: what the newest record lists. That
    /// record has to be made durable (once more) before the first request comes.
    pub fn new(places: usize, requests: usize, active: &[u32], bug: Option<Bug>) -> Self {
        let free = Place { region: 0, stage: Stage::Free, writes: 0, used: 0 };
        let mut places = vec![free; places.max(active.len())];
        for (place, region) in places.iter_mut().zip(active) {
            *place = Place { region: *region, stage: Stage::Active, ..free };
        }
        Self {
            places: places.into(),
            requests: vec![Request { first: 0, end: 0, held: Held::Nothing }; requests].into(),
            queue: VecDeque::with_capacity(requests),
            composed: 0,
            time: 0,
            recording: false,
            batching: false,
            failed: false,
            bug,
        }
    }

    /// A write of these regions comes, or is tried again. Once let in it stays in, until it leaves.
    pub fn enter(&mut self, request: usize, regions: Range<u32>) -> Entry {
        match self.requests[request].held {
            Held::Regions => return Entry::Go,
            Held::Waits if !self.failed => return Entry::Wait,
            _ => {}
        }
        self.requests[request] =
            Request { first: regions.start, end: regions.end, held: Held::Waits };
        if self.failed || regions.len() > self.places.len() {
            // Longer than the device's limits allow: nothing could be said of it.
            self.failed = true;
            self.requests[request].held = Held::Nothing;
            return Entry::Go;
        }
        if !self.starves() && self.lists(request) {
            self.let_in(request);
            return Entry::Go;
        }
        self.queue.push_back(request);
        if self.bug == Some(Bug::HoldSome) {
            self.hold_some(request);
        }
        Entry::Wait
    }

    /// A write that was let in is done, and marked.
    pub fn leave(&mut self, request: usize) {
        let Request { first, end, held } = self.requests[request];
        if held != Held::Regions {
            return;
        }
        self.requests[request].held = Held::Nothing;
        self.time += 1;
        for region in first..end {
            if let Some(at) = self.place_of(region) {
                let place = &mut self.places[at];
                place.writes = place.writes.saturating_sub(1);
                place.used = self.time;
            }
        }
    }

    /// Whether a record would let somebody in.
    pub fn wants_record(&self) -> bool {
        let Some(head) = self.queue.front().filter(|_| !self.recording && !self.failed) else {
            return false;
        };
        self.missing(*head) <= self.room()
    }

    /// Begins a record: those that wait get places as far as there are any, and what has left makes
    /// room. What it lists is [`Self::listed`].
    pub fn begin_record(&mut self) {
        assert!(!self.recording, "one record at a time");
        self.recording = true;
        self.composed = 0;
        for at in 0..self.queue.len() {
            let request = self.queue[at];
            // What it needs and is still listed stays.
            for region in self.regions(request) {
                if let Some(place) = self.place_of(region)
                    && self.places[place].stage == Stage::Left
                {
                    self.places[place].stage = Stage::Active;
                }
            }
            if self.missing(request) > self.room() {
                break;
            }
            for region in self.regions(request) {
                if self.place_of(region).is_none() {
                    let at = self.vacant();
                    self.places[at] =
                        Place { region, stage: Stage::Joining, writes: 0, used: self.time };
                }
            }
            self.composed = at + 1;
        }
        // Not listed any more from here on: whoever writes there waits for the next record.
        for place in self.places.iter_mut().filter(|place| place.stage == Stage::Left) {
            place.stage = Stage::Free;
        }
    }

    /// What the record on its way lists.
    pub fn listed(&self) -> impl Iterator<Item = u32> + '_ {
        let early = self.bug == Some(Bug::LeaveEarly);
        let stays = move |stage| stage != Stage::Free && !(early && stage == Stage::Leaving);
        self.places.iter().filter(move |place| stays(place.stage)).map(|place| place.region)
    }

    /// The record is durable. `go` gets the requests that are let in.
    pub fn recorded(&mut self, mut go: impl FnMut(usize)) {
        self.recording = false;
        for place in self.places.iter_mut().filter(|place| place.stage == Stage::Joining) {
            place.stage = Stage::Active;
        }
        let composed = std::mem::take(&mut self.composed);
        for _ in 0..composed {
            if let Some(request) = self.queue.pop_front() {
                self.let_in(request);
                go(request);
            }
        }
    }

    /// Whether regions should leave: few places are vacant. True for as long as some could.
    pub fn wants_batch(&self) -> bool {
        let wanted = self.queue.front().map_or(0, |head| self.missing(*head));
        let scarce = self.room() < self.places.len().div_ceil(4).max(wanted);
        !self.batching
            && !self.failed
            && scarce
            && self.places.iter().any(|place| self.is_idle(place))
    }

    /// Begins a batch: the regions that were not written to for the longest time leave, if there
    /// are few places. [`Self::leaving`] says which.
    pub fn begin_batch(&mut self) {
        assert!(!self.batching, "one batch at a time");
        let some = self.wants_batch();
        self.batching = true;
        let count = if some { self.places.len().div_ceil(4) } else { 0 };
        for _ in 0..count {
            let idle = self.places.iter().enumerate().filter(|(_, place)| self.is_idle(place));
            let Some((at, _)) = idle.min_by_key(|(_, place)| place.used) else { return };
            self.places[at].stage = Stage::Leaving;
        }
    }

    /// Regions of the batch on its way that nobody has entered since it began.
    pub fn leaving(&self) -> impl Iterator<Item = u32> + '_ {
        self.places.iter().filter(|place| place.stage == Stage::Leaving).map(|place| place.region)
    }

    /// The batch is done: its regions need not be listed any more.
    pub fn batched(&mut self) {
        self.batching = false;
        for place in self.places.iter_mut().filter(|place| place.stage == Stage::Leaving) {
            place.stage = Stage::Left;
        }
    }

    /// The reserve has failed: there is no log any more, and whoever waits goes.
    pub fn fail(&mut self, mut go: impl FnMut(usize)) {
        self.failed = true;
        while let Some(request) = self.queue.pop_front() {
            self.requests[request].held = Held::Nothing;
            go(request);
        }
    }

    /// Whether somebody waits.
    pub fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether it has failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn regions(&self, request: usize) -> Range<u32> {
        self.requests[request].first..self.requests[request].end
    }

    fn place_of(&self, region: u32) -> Option<usize> {
        self.places.iter().position(|p| p.stage != Stage::Free && p.region == region)
    }

    /// Whether the newest durable record, and the one on its way, list all that it needs.
    fn lists(&self, request: usize) -> bool {
        self.regions(request).all(|region| {
            self.place_of(region).is_some_and(|at| self.places[at].stage != Stage::Joining)
        })
    }

    fn let_in(&mut self, request: usize) {
        self.requests[request].held = Held::Regions;
        self.time += 1;
        for region in self.regions(request) {
            let at = self.place_of(region).expect("it is listed");
            let place = &mut self.places[at];
            place.writes += 1;
            place.used = self.time;
            // What was captured of it is no longer all.
            if self.bug != Some(Bug::LeaveAnyway) || place.stage == Stage::Joining {
                place.stage = Stage::Active;
            }
        }
    }

    fn missing(&self, request: usize) -> usize {
        self.regions(request).filter(|region| self.place_of(*region).is_none()).count()
    }

    /// Whether the first of those that wait needs it: then it stays.
    fn is_awaited(&self, region: u32) -> bool {
        self.queue.front().is_some_and(|head| self.regions(*head).contains(&region))
    }

    fn is_vacant(&self, place: &Place) -> bool {
        match place.stage {
            Stage::Free => true,
            Stage::Left => !self.is_awaited(place.region),
            _ => false,
        }
    }

    /// Places that a record may give away.
    fn room(&self) -> usize {
        self.places.iter().filter(|place| self.is_vacant(place)).count()
    }

    fn vacant(&self) -> usize {
        let free = self.places.iter().position(|place| place.stage == Stage::Free);
        let vacant = || self.places.iter().position(|place| self.is_vacant(place));
        free.or_else(vacant).expect("there is room")
    }

    fn is_idle(&self, place: &Place) -> bool {
        let in_flight = place.writes > 0 && self.bug != Some(Bug::LeaveInFlight);
        let wanted = self.is_composed(place.region) || self.is_awaited(place.region);
        place.stage == Stage::Active && !in_flight && !wanted
    }

    /// A record on its way lets somebody in there.
    fn is_composed(&self, region: u32) -> bool {
        let composed = self.queue.iter().take(self.composed);
        composed.into_iter().any(|request| self.regions(*request).contains(&region))
    }

    /// The first of those that wait cannot have its places unless those who are in come to an end
    /// before others follow them.
    fn starves(&self) -> bool {
        let Some(head) = self.queue.front() else { return false };
        let missing = self.missing(*head);
        let soon = |place: &&Place| {
            let leaves = place.stage == Stage::Leaving && !self.is_awaited(place.region);
            leaves || self.is_vacant(place) || self.is_idle(place)
        };
        missing > 0 && missing >= self.places.iter().filter(soon).count()
    }

    fn hold_some(&mut self, request: usize) {
        for region in self.regions(request) {
            if let Some(at) = self.place_of(region) {
                self.places[at].writes += 1;
            }
        }
    }
}
