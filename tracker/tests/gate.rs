//! The filter's gate under a simulated application, disk and agent, with kills of both processes.
//!
//! Everything goes in steps of one cell (a quarter of a block), in an order drawn from a seed: disk
//! operations tear, several volumes and lanes run side by side. The oracle is the write order: what
//! an application had been told (a write was done, a read returned this) before it issued a write
//! that a point holds, the point holds as well. Each known mistake must be noticed by it.

use secondsite_tracker::filter::gate::{Admission, Bug, Gate, Preserve, Wake};
use secondsite_tracker::filter::shared::{Form, Group, Shared};
use secondsite_tracker::marks::BlockRun;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

const BLOCK: u64 = 4096;
const CELL: u64 = 1024;
const CELLS: u64 = BLOCK / CELL;
const BLOCKS: u64 = 24;
const VOLUMES: usize = 2;
const LANES: usize = 2;
const DEPTH: usize = 4;
const THREADS: usize = 6;
const STEPS: u32 = 6000;

/// Mistakes beyond those of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    Gate(Bug),
    /// Volumes flip one after another, with acknowledgements in between.
    FlipApart,
    /// The agent takes a block out of the cut, then reads it.
    ClearThenRead,
    /// The agent reads before the writes from before the flip are done.
    ReadUnsettled,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A place on a volume.
type Place = (usize, u64);

#[derive(Clone)]
struct Request {
    volume: usize,
    lane: usize,
    tag: u16,
    cells: Range<u64>,
    /// The stamp that it writes; none if it reads.
    stamp: Option<u64>,
    /// Cells that the disk has still to do, then on its second leg; and what was read.
    left: Vec<u64>,
    left_behind: Vec<u64>,
    read: Vec<(u64, u64)>,
    state: At,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Arrived,
    Waiting,
    Disk,
    Done,
}

struct Copying {
    volume: usize,
    copy: Preserve,
    left: Vec<u64>,
}

/// What the application knows: at this time, this place held this stamp, or a later one.
struct Fact {
    time: u64,
    place: Place,
    stamp: u64,
}

enum Agent {
    Idle,
    /// Passes left, then the cut.
    Passing {
        runs: Vec<BlockRun>,
        read: Vec<(u64, u64)>,
        volume: usize,
        passes: u32,
    },
    Collecting {
        flips: Vec<u64>,
        volume: usize,
        runs: Vec<BlockRun>,
        left: Vec<u64>,
        read: Vec<(u64, u64)>,
    },
}

struct World {
    random: Random,
    /// One in so many of the steps that may be a kill of the filter is one.
    kills: usize,
    mistake: Option<Mistake>,
    time: u64,
    /// Two legs of a mirror: a write reaches the second later, and a read is from either.
    disk: Vec<Vec<[u64; 2]>>,
    /// By place: first and last time that a stamp was applied there.
    applied: std::collections::HashMap<(Place, u64), (u64, u64)>,
    issued: Vec<u64>,
    facts: Vec<Fact>,
    requests: Vec<Option<Request>>,
    copies: Vec<Copying>,
    memory: Vec<Arc<[AtomicU64]>>,
    groups: Vec<Group>,
    gates: Vec<Gate>,
    ours: Vec<Shared>,
    image: Vec<Vec<u64>>,
    staged: Vec<Vec<Option<u64>>>,
    agent: Agent,
    epoch: u64,
    flipped: Vec<u64>,
    points: u32,
    fallen: u32,
    preserved: u64,
}

fn form() -> Form {
    Form {
        volume_bytes: BLOCKS * BLOCK - CELL,
        block_bytes: BLOCK as u32,
        memory_slots: 5,
        spill_slots: 0,
        identity: 7,
    }
}

fn cells_of_volume() -> u64 {
    BLOCKS * CELLS - 1
}

impl World {
    fn new(seed: u64, mistake: Option<Mistake>) -> Self {
        let memory: Vec<_> = (0..VOLUMES).map(|_| Shared::heap(&form())).collect();
        let groups: Vec<_> = (0..VOLUMES).map(|_| Group::in_memory()).collect();
        let cells = cells_of_volume() as usize;
        let mut world = Self {
            kills: if seed.is_multiple_of(2) { 6 } else { 2 },
            random: Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            mistake,
            time: 0,
            disk: vec![vec![[0; 2]; cells]; VOLUMES],
            applied: Default::default(),
            issued: vec![0],
            facts: Vec::new(),
            requests: vec![None; THREADS],
            copies: Vec::new(),
            memory,
            groups,
            gates: Vec::new(),
            ours: Vec::new(),
            image: vec![vec![0; cells]; VOLUMES],
            staged: vec![vec![None; cells]; VOLUMES],
            agent: Agent::Idle,
            epoch: 0,
            flipped: vec![0; VOLUMES],
            points: 0,
            fallen: 0,
            preserved: 0,
        };
        world.start_filter();
        world.start_agent();
        world
    }

    fn group(&self, volume: usize) -> &Group {
        // One group, unless volumes are to flip apart.
        &self.groups[if self.mistake == Some(Mistake::FlipApart) { volume } else { 0 }]
    }

    fn start_filter(&mut self) {
        let bug = match self.mistake {
            Some(Mistake::Gate(bug)) => Some(bug),
            _ => None,
        };
        self.gates = (0..VOLUMES)
            .map(|v| {
                let shared = Shared::in_memory(form(), self.group(v), false, &self.memory[v]);
                let gate = Gate::with_bug(Arc::new(shared), LANES, DEPTH, bug);
                gate.take_over();
                gate
            })
            .collect();
    }

    fn start_agent(&mut self) {
        self.ours = (0..VOLUMES)
            .map(|v| Shared::in_memory(form(), self.group(v), true, &self.memory[v]))
            .collect();
        self.give_up();
    }

    /// The filter dies. What it had submitted ends before the next one begins; what was not
    /// acknowledged is issued once more.
    fn kill_filter(&mut self) {
        let busy = |request: &Request| {
            request.state == At::Disk
                && !(request.left.is_empty() && request.left_behind.is_empty())
        };
        while let Some(thread) = self.requests.iter().position(|r| r.as_ref().is_some_and(busy)) {
            self.disk_step(thread);
        }
        self.copies.clear();
        self.gates.clear();
        for request in self.requests.iter_mut().flatten() {
            request.state = At::Arrived;
            request.left = request.cells.clone().collect();
            request.read.clear();
        }
        self.start_filter();
    }

    fn step(&mut self) {
        self.time += 1;
        match self.random.below(100) {
            0 if self.random.one_in(self.kills) => self.kill_filter(),
            1 if self.random.one_in(6) => self.start_agent(),
            2..=25 => self.agent_step(),
            26..=45 if !self.copies.is_empty() => self.copy_step(),
            _ => {
                let thread = self.random.below(THREADS);
                self.thread_step(thread);
            }
        }
    }

    fn thread_step(&mut self, thread: usize) {
        let Some(request) = &self.requests[thread] else { return self.issue(thread) };
        match request.state {
            At::Arrived => self.admit(thread),
            At::Waiting => {}
            At::Disk if request.left.is_empty() && request.left_behind.is_empty() => {
                self.finished(thread)
            }
            At::Disk => self.disk_step(thread),
            At::Done => self.acknowledge(thread),
        }
    }

    fn issue(&mut self, thread: usize) {
        let volume = self.random.below(VOLUMES);
        let cells = cells_of_volume();
        let first = self.random.below(cells as usize) as u64;
        // Now and then something as large as a discard.
        let most = if self.random.one_in(30) { 40 } else { 9 };
        let end = (first + 1 + self.random.below(most) as u64).min(cells);
        let stamp = (!self.random.one_in(4)).then(|| {
            self.issued.push(self.time);
            self.issued.len() as u64 - 1
        });
        let lane = self.random.below(LANES);
        self.requests[thread] = Some(Request {
            volume,
            lane,
            tag: (thread % DEPTH) as u16,
            cells: first..end,
            stamp,
            left: (first..end).collect(),
            left_behind: Vec::new(),
            read: Vec::new(),
            state: At::Arrived,
        });
        // A tag belongs to one request of a lane.
        let taken = |other: usize| {
            other != thread
                && matches!(&self.requests[other], Some(r) if (r.volume, r.lane, r.tag) == (volume, lane, (thread % DEPTH) as u16))
        };
        if (0..THREADS).any(taken) {
            self.requests[thread] = None;
            if stamp.is_some() {
                self.issued.pop();
            }
        }
    }

    fn admit(&mut self, thread: usize) {
        let Some(request) = &mut self.requests[thread] else { return };
        request.state = At::Disk;
        if request.stamp.is_none() {
            return;
        }
        let (volume, mut out) = (request.volume, Vec::new());
        let bytes = request.cells.start * CELL..request.cells.end * CELL;
        let admission = self.gates[volume].admit(request.lane, request.tag, bytes, &mut out);
        if admission == Admission::Wait {
            request.state = At::Waiting;
        }
        for copy in out {
            let cells = copy.offset / CELL..(copy.offset + u64::from(copy.bytes)) / CELL;
            self.copies.push(Copying { volume, copy, left: cells.collect() });
        }
    }

    fn disk_step(&mut self, thread: usize) {
        let Some(request) = &mut self.requests[thread] else { return };
        let second =
            request.left.is_empty() || !request.left_behind.is_empty() && self.random.one_in(2);
        let (volume, cells) =
            (request.volume, if second { &mut request.left_behind } else { &mut request.left });
        let cell = cells.swap_remove(self.random.below(cells.len()));
        let place = (volume, cell);
        match request.stamp {
            Some(_) if second => {
                let legs = &mut self.disk[volume][cell as usize];
                legs[1] = legs[0];
            }
            Some(stamp) => {
                self.disk[volume][cell as usize][0] = stamp;
                request.left_behind.push(cell);
                let times = self.applied.entry((place, stamp)).or_insert((self.time, 0));
                times.1 = self.time;
                self.time += 1;
            }
            None => {
                let leg = self.random.below(2);
                request.read.push((cell, self.disk[volume][cell as usize][leg]));
            }
        }
    }

    fn finished(&mut self, thread: usize) {
        let Some(request) = &mut self.requests[thread] else { return };
        request.state = At::Done;
        if request.stamp.is_some() {
            let wake = self.gates[request.volume].completed(request.lane, request.tag);
            let volume = request.volume;
            self.wake(volume, wake);
        }
    }

    fn acknowledge(&mut self, thread: usize) {
        let Some(request) = self.requests[thread].take() else { return };
        let (time, volume) = (self.time, request.volume);
        let read = request.read.into_iter();
        let written = request.stamp.map(|stamp| request.cells.map(move |cell| (cell, stamp)));
        let known = read.chain(written.into_iter().flatten());
        self.facts.extend(known.map(|(cell, stamp)| Fact { time, place: (volume, cell), stamp }));
    }

    fn copy_step(&mut self) {
        let at = self.random.below(self.copies.len());
        let Copying { volume, copy, left } = &mut self.copies[at];
        if left.is_empty() {
            let (volume, copy) = (*volume, *copy);
            self.copies.swap_remove(at);
            let ok = !self.random.one_in(200);
            let wake = self.gates[volume].preserved(&copy, ok);
            return self.wake(volume, wake);
        }
        let cell = left.swap_remove(self.random.below(left.len()));
        let stamp = self.disk[*volume][cell as usize][self.random.below(2)];
        let from_slot = cell - copy.offset / CELL;
        let slot = self.gates[*volume].shared().slot(copy.slot + (from_slot / CELLS) as u32);
        // SAFETY: a slot has a block's bytes; one thread only.
        unsafe { slot.add((from_slot % CELLS * CELL) as usize).cast::<u64>().write(stamp) };
    }

    fn wake(&mut self, volume: usize, wake: Wake) {
        for request in self.requests.iter_mut().flatten() {
            if request.volume == volume
                && request.state == At::Waiting
                && wake >> request.lane & 1 == 1
            {
                request.state = At::Arrived;
            }
        }
    }

    // ---- the agent

    fn give_up(&mut self) {
        for shared in &self.ours {
            shared.marks().give_up();
        }
        self.staged.iter_mut().flatten().for_each(|cell| *cell = None);
        self.agent = Agent::Idle;
    }

    fn agent_step(&mut self) {
        match std::mem::replace(&mut self.agent, Agent::Idle) {
            Agent::Idle => {
                if !self.random.one_in(8) {
                    return;
                }
                self.epoch += 1;
                for shared in &self.ours {
                    shared.marks().begin(self.epoch, [self.epoch as u8; 16]);
                }
                let passes = if self.random.one_in(2) { 0 } else { 2 };
                self.agent =
                    Agent::Passing { runs: Vec::new(), read: Vec::new(), volume: 0, passes };
            }
            Agent::Passing { mut runs, mut read, mut volume, mut passes } => {
                if let Some(run) = runs.last_mut() {
                    let cells = run.first * CELLS..((run.first + 1) * CELLS).min(cells_of_volume());
                    for cell in cells {
                        self.staged[volume][cell as usize] =
                            Some(self.disk[volume][cell as usize][self.random.below(2)]);
                    }
                    (run.first, run.count) = (run.first + 1, run.count - 1);
                    if run.count == 0 {
                        runs.pop();
                    }
                } else if passes == 0 {
                    return self.cut();
                } else {
                    self.ours[volume].marks().take(6, &mut runs);
                    if runs.is_empty() {
                        volume += 1;
                    }
                    if volume == VOLUMES {
                        (volume, passes) = (0, passes - 1);
                    }
                }
                read.clear();
                self.agent = Agent::Passing { runs, read, volume, passes };
            }
            Agent::Collecting { flips, volume, runs, left, read } => {
                self.collect(flips, volume, runs, left, read);
            }
        }
    }

    fn cut(&mut self) {
        let again = |world: &mut Self| {
            world.agent =
                Agent::Passing { runs: Vec::new(), read: Vec::new(), volume: 0, passes: 0 };
        };
        if self.mistake == Some(Mistake::FlipApart) {
            for v in 0..VOLUMES {
                if self.flipped[v] != self.epoch {
                    if self.random.below(12) > 0 {
                        return again(self);
                    }
                    let gates = std::slice::from_ref(&self.gates[v]).iter();
                    if let Ok(flip) = Gate::cut(self.group(v), gates) {
                        self.ours[v].marks().flipped(flip);
                        self.flipped[v] = self.epoch;
                    }
                    // The other one at another step.
                    return again(self);
                }
            }
            let flips = self.ours.iter().map(|shared| shared.marks().flip()).collect();
            self.agent =
                Agent::Collecting { flips, volume: 0, runs: vec![], left: vec![], read: vec![] };
            return;
        }
        match Gate::cut(self.group(0), self.gates.iter()) {
            Ok(flip) => {
                self.ours.iter().for_each(|shared| shared.marks().flipped(flip));
                let flips = vec![flip; VOLUMES];
                self.agent = Agent::Collecting {
                    flips,
                    volume: 0,
                    runs: vec![],
                    left: vec![],
                    read: vec![],
                };
            }
            Err(_) => again(self),
        }
    }

    fn collect(
        &mut self,
        flips: Vec<u64>,
        mut volume: usize,
        mut runs: Vec<BlockRun>,
        mut left: Vec<u64>,
        mut read: Vec<(u64, u64)>,
    ) {
        let shared = &self.ours[volume];
        let flip = flips[volume];
        let settled = shared.settled(flip) || self.mistake == Some(Mistake::ReadUnsettled);
        if shared.fallen(flip).is_some() {
            self.fallen += 1;
            return self.give_up();
        }
        if !settled {
            // Not yet.
        } else if let Some(cell) = left.pop() {
            read.push((cell, self.disk[volume][cell as usize][self.random.below(2)]));
        } else if !runs.is_empty() {
            let mut done = Vec::new();
            for run in runs.drain(..) {
                shared.marks().cut_done(run, &mut done);
                if self.mistake == Some(Mistake::ClearThenRead) {
                    done.push(run);
                }
            }
            for (cell, stamp) in read.drain(..) {
                let block = cell / CELLS;
                if done.iter().any(|run| (run.first..run.first + run.count).contains(&block)) {
                    self.staged[volume][cell as usize] = Some(stamp);
                }
            }
        } else {
            for kept in shared.kept(flip).collect::<Vec<_>>() {
                self.preserved += 1;
                let cells = kept.block * CELLS..((kept.block + 1) * CELLS).min(cells_of_volume());
                for cell in cells {
                    let from = shared.slot(kept.slot);
                    // SAFETY: within the slot.
                    let stamp =
                        unsafe { from.add((cell % CELLS * CELL) as usize).cast::<u64>().read() };
                    self.staged[volume][cell as usize] = Some(stamp);
                }
                shared.free(kept);
            }
            let from = self.random.below(BLOCKS as usize) as u64;
            shared.marks().cut_runs(from, 3, &mut runs);
            if runs.is_empty() {
                shared.marks().cut_runs(0, 3, &mut runs);
            }
            if self.mistake == Some(Mistake::ClearThenRead) {
                runs.iter().for_each(|run| shared.marks().cut_done(*run, &mut Vec::new()));
            }
            for run in &runs {
                left.extend(
                    run.first * CELLS..((run.first + run.count) * CELLS).min(cells_of_volume()),
                );
            }
            if runs.is_empty()
                && shared.marks().cut_is_clear()
                && shared.kept(flip).next().is_none()
            {
                volume += 1;
            }
        }
        if volume == VOLUMES {
            return self.commit(&flips);
        }
        self.agent = Agent::Collecting { flips, volume, runs, left, read };
    }

    fn commit(&mut self, flips: &[u64]) {
        if self.ours.iter().zip(flips).any(|(shared, flip)| shared.fallen(*flip).is_some()) {
            self.fallen += 1;
            return self.give_up();
        }
        for (image, staged) in self.image.iter_mut().zip(&mut self.staged) {
            for (cell, staged) in image.iter_mut().zip(staged) {
                *cell = staged.take().unwrap_or(*cell);
            }
        }
        self.check();
        for shared in &self.ours {
            assert!(shared.marks().committed([self.epoch as u8; 16]));
        }
        self.points += 1;
    }

    /// The image is a prefix of the write order.
    fn check(&mut self) {
        let places = (0..VOLUMES).flat_map(|v| (0..cells_of_volume()).map(move |cell| (v, cell)));
        let issued = |(v, cell): Place| {
            let stamp = self.image[v][cell as usize];
            (self.issued[stamp as usize], stamp, (v, cell))
        };
        let (newest, newest_stamp, at) = places.map(issued).max().unwrap_or_default();
        for fact in self.facts.iter().filter(|fact| fact.time < newest) {
            let stamp = self.image[fact.place.0][fact.place.1 as usize];
            let first = self.applied.get(&(fact.place, fact.stamp)).map_or(0, |times| times.0);
            let last = self.applied.get(&(fact.place, stamp)).map_or(0, |times| times.1);
            assert!(
                last >= first,
                "point {}: {:?} holds {stamp}, but {} was known there before {newest_stamp} was issued, which it holds at {at:?}",
                self.points,
                fact.place,
                fact.stamp
            );
        }
    }

    /// Nothing more is issued; everything ends; one more point equals the disk.
    fn end(&mut self) {
        self.time += 1;
        let mut rounds = 0;
        while self.requests.iter().any(Option::is_some) {
            rounds += 1;
            assert!(rounds < 100_000, "a request waits for ever");
            while !self.copies.is_empty() {
                self.copy_step();
            }
            for thread in 0..THREADS {
                if self.requests[thread].is_some() {
                    self.time += 1;
                    self.thread_step(thread);
                }
            }
        }
        self.give_up();
        let points = self.points;
        while self.points == points {
            rounds += 1;
            assert!(rounds < 200_000, "no last point");
            self.agent_step();
        }
        for volume in 0..VOLUMES {
            let disk: Vec<u64> = self.disk[volume].iter().map(|legs| legs[0]).collect();
            assert_eq!(self.image[volume], disk, "the last point is the disk");
        }
    }
}

fn run(seed: u64, mistake: Option<Mistake>) -> (u32, u32, u64) {
    let mut world = World::new(seed, mistake);
    for _ in 0..STEPS {
        world.step();
    }
    world.end();
    (world.points, world.fallen, world.preserved)
}

/// The answer to a cut may be lost, and the filter make it after the agent has gone on.
#[test]
fn a_flip_that_nobody_follows_is_live_again() {
    let (group, memory) = (Group::in_memory(), Shared::heap(&form()));
    let filters = Shared::in_memory(form(), &group, false, &memory);
    let ours = Shared::in_memory(form(), &group, true, &memory);
    let gate = Gate::new(Arc::new(filters), 1, DEPTH);
    gate.take_over();
    assert_eq!(gate.admit(0, 0, 0..BLOCK, &mut Vec::new()), Admission::Go);
    gate.completed(0, 0);
    Gate::cut(&group, std::iter::once(&gate)).unwrap();
    assert_eq!(ours.marks().live_count(), 0);
    ours.marks().begin(1, [1; 16]);
    assert_eq!(ours.marks().live_count(), 1, "what it held is live");
    assert!(ours.marks().cut_is_clear());
}

fn seeds() -> Range<u64> {
    if let Some(seed) = std::env::var("SECONDSITE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return seed..seed + 1;
    }
    1..if std::env::var_os("SECONDSITE_LONG").is_some() { 5000 } else { 300 }
}

#[test]
fn every_point_is_a_prefix_of_the_write_order() {
    let (mut points, mut fallen, mut preserved) = (0, 0, 0);
    for seed in seeds() {
        let ran = std::panic::catch_unwind(|| run(seed, None));
        let (p, f, k) = ran.unwrap_or_else(|_| panic!("SECONDSITE_SEED={seed}"));
        (points, fallen, preserved) = (points + p, fallen + f, preserved + k);
    }
    println!("{points} points, {fallen} epochs given up, {preserved} blocks preserved");
}

#[test]
fn every_known_mistake_is_noticed() {
    let mistakes = [
        Mistake::Gate(Bug::ReadInFlight),
        Mistake::Gate(Bug::NoPreserve),
        Mistake::Gate(Bug::NoSecondMark),
        Mistake::Gate(Bug::NoMarkAtFlip),
        Mistake::Gate(Bug::ForgetInFlight),
        Mistake::FlipApart,
        Mistake::ClearThenRead,
        Mistake::ReadUnsettled,
    ];
    std::panic::set_hook(Box::new(|_| {}));
    for mistake in mistakes {
        let noticed =
            (1..8000).find(|seed| std::panic::catch_unwind(|| run(*seed, Some(mistake))).is_err());
        println!("{mistake:?}: noticed with seed {noticed:?}");
        assert!(noticed.is_some(), "{mistake:?} was not noticed");
    }
    let _ = std::panic::take_hook();
}
