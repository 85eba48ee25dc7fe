//! The write-intent log under a simulated application, disks with volatile caches, an agent and a
//! target, with a power cut, or a kill of the filter, at every I/O.
//!
//! The oracle: after a power cut each block whose content on the medium is not what the target has
//! committed must be dirty in the bitmap on disk, or lie in an active region. And nobody waits for
//! ever. Each known mistake must be noticed by it.

use secondsite_tracker::filter::intent::{BATCH, Bug, Entry, Intent, Io, RECORD};
use std::collections::BTreeSet;

const REGIONS: u32 = 24;
const REGION_BLOCKS: u32 = 3;
const BLOCKS: u32 = REGIONS * REGION_BLOCKS;
/// Regions that share a page of the bitmap.
const PAGE_REGIONS: u32 = 3;
const PAGES: u32 = REGIONS.div_ceil(PAGE_REGIONS);
const PLACES: usize = 8;
const REQUESTS: usize = 12;
const STEPS: u32 = 4000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    Machine(Bug),
    /// A step of I/O is left out.
    RecordUnflushed,
    PagesUnflushed,
    BackingUnflushed,
    /// What is taken is not captured.
    LiveOnly,
    /// A write leaves its region when it is submitted.
    LeaveAtSubmit,
    /// No mark when a write is done.
    NoSecondMark,
    /// A filter that starts believes what it reads, without a flush.
    TrustUnflushed,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }
    fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }
}

/// A device with a volatile cache: what was written is read at once, and lost or not in a power cut
/// until a flush that came later has ended.
struct Disk<T> {
    medium: Vec<T>,
    /// Number, place and content, in the order of their completion.
    cache: Vec<(u64, usize, T)>,
    written: u64,
}

impl<T: Clone> Disk<T> {
    fn new(content: T, places: usize) -> Self {
        Self { medium: vec![content; places], cache: Vec::new(), written: 0 }
    }
    fn read(&self, place: usize) -> T {
        let newest = self.cache.iter().rev().find(|(_, at, _)| *at == place);
        newest.map_or_else(|| self.medium[place].clone(), |(_, _, content)| content.clone())
    }
    fn write(&mut self, place: usize, content: T) {
        self.written += 1;
        self.cache.push((self.written, place, content));
    }
    /// Ends a flush that began after so many writes; of later ones some may be in it, none need be.
    fn flush(&mut self, written: u64) {
        for (_, place, content) in self.cache.extract_if(.., |(number, ..)| *number <= written) {
            self.medium[place] = content;
        }
    }
    /// Any of what is in the cache may have reached the medium.
    fn power_cut(&mut self, random: &mut Random) {
        for (_, place, content) in std::mem::take(&mut self.cache) {
            if random.below(2) == 0 {
                self.medium[place] = content;
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Waits,
    /// Let in by the log, and not yet marked.
    In,
    /// On its way, with so many blocks done.
    Down(u32),
}

#[derive(Clone, Copy)]
struct Write {
    first: u32,
    count: u32,
    stamp: u64,
    at: At,
}

type Record = (u64, Vec<u32>);

struct World {
    random: Random,
    mistake: Option<Mistake>,
    stamp: u64,
    backing: Disk<u64>,
    records: Disk<Record>,
    pages: Disk<BTreeSet<u32>>,
    live: BTreeSet<u32>,
    taken: BTreeSet<u32>,
    staged: Vec<(u32, u64)>,
    target: Vec<u64>,
    writes: Vec<Option<Write>>,
    intent: Intent,
    number: u64,
    /// Where the two sequences are; what a flush that has begun will flush.
    record: Option<(usize, Record)>,
    batch: Option<(usize, BTreeSet<u32>, BTreeSet<u32>)>,
    flushing: Vec<(Flush, [u64; 3])>,
    is_calm: bool,
    cuts: u32,
    listed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    Record,
    Batch,
}

impl World {
    fn new(seed: u64, mistake: Option<Mistake>) -> Self {
        let bug = bug_of(mistake);
        Self {
            random: Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            mistake,
            stamp: 0,
            backing: Disk::new(0, BLOCKS as usize),
            records: Disk::new((0, Vec::new()), 2),
            pages: Disk::new(BTreeSet::new(), PAGES as usize),
            live: BTreeSet::new(),
            taken: BTreeSet::new(),
            staged: Vec::new(),
            target: vec![0; BLOCKS as usize],
            writes: vec![None; REQUESTS],
            intent: Intent::new(PLACES, REQUESTS, &[], bug),
            number: 0,
            record: None,
            batch: None,
            flushing: Vec::new(),
            is_calm: seed.is_multiple_of(3),
            cuts: 0,
            listed: 0,
        }
    }

    fn is(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.below(100) {
            0..=24 => self.arrive(),
            25..=54 => self.progress(),
            55..=69 => self.record_step(),
            70..=84 => self.batch_step(),
            85..=96 => self.agent_step(),
            // In every third run long stretches without.
            _ if self.is_calm && self.random.below(20) > 0 => {}
            97..=98 => self.power_cut()?,
            _ => self.kill(),
        }
        Ok(())
    }

    fn arrive(&mut self) {
        let Some(request) = self.writes.iter().position(Option::is_none) else { return };
        // Now and then a discard over several regions; often the same few regions.
        let (near, long) = (self.random.below(2) == 0, self.random.below(6) == 0);
        let first = self.random.below(if near { BLOCKS / 3 } else { BLOCKS });
        let most = if long { REGION_BLOCKS + 1 } else { 2 };
        let count = (1 + self.random.below(most)).min(BLOCKS - first);
        self.stamp += 1;
        let write = Write { first, count, stamp: self.stamp, at: At::Waits };
        self.writes[request] = Some(write);
        self.admit(request);
    }

    fn admit(&mut self, request: usize) {
        let Some(write) = self.writes[request] else { return };
        let regions =
            write.first / REGION_BLOCKS..(write.first + write.count - 1) / REGION_BLOCKS + 1;
        if self.intent.enter(request, regions) == Entry::Go {
            self.writes[request] = Some(Write { at: At::In, ..write });
            if self.is(Mistake::LeaveAtSubmit) {
                self.intent.leave(request);
            }
        }
    }

    /// A write that is down reaches another block, or is done.
    fn progress(&mut self) {
        let request = self.random.below(REQUESTS as u32) as usize;
        let Some(write) = self.writes[request] else { return };
        let done = match write.at {
            At::Waits => return,
            At::In => {
                self.live.extend(write.first..write.first + write.count);
                self.writes[request] = Some(Write { at: At::Down(0), ..write });
                return;
            }
            At::Down(done) => done,
        };
        if done < write.count {
            self.backing.write((write.first + done) as usize, write.stamp);
            self.writes[request] = Some(Write { at: At::Down(done + 1), ..write });
            return;
        }
        if !self.is(Mistake::NoSecondMark) {
            self.live.extend(write.first..write.first + write.count);
        }
        self.intent.leave(request);
        self.writes[request] = None;
    }

    /// Begins a flush, or ends one that has begun: what came in between is not in it.
    fn flush_is_over(&mut self, whose: Flush, backing: bool) -> bool {
        let Some(begun) = self.flushing.iter().position(|(flush, _)| *flush == whose) else {
            let written = [self.backing.written, self.records.written, self.pages.written];
            self.flushing.push((whose, written));
            return false;
        };
        let (_, [below, records, pages]) = self.flushing.swap_remove(begun);
        if backing {
            self.backing.flush(below);
        } else {
            self.records.flush(records);
            self.pages.flush(pages);
        }
        true
    }

    fn record_step(&mut self) {
        let Some((at, record)) = self.record.clone() else {
            if self.intent.wants_record() {
                self.intent.begin_record();
                self.number += 1;
                self.listed += 1;
                self.record = Some((0, (self.number, self.intent.listed().collect())));
            }
            return;
        };
        match RECORD.get(at) {
            Some(Io::WriteRecord) => self.records.write((record.0 % 2) as usize, record.clone()),
            Some(_) if self.is(Mistake::RecordUnflushed) => {}
            Some(_) if !self.flush_is_over(Flush::Record, false) => return,
            Some(_) => {}
            None => {
                self.record = None;
                let mut go = Vec::new();
                self.intent.recorded(|request| go.push(request));
                go.into_iter().for_each(|request| self.admit(request));
                return;
            }
        }
        self.record = Some((at + 1, record));
    }

    fn captured(&self) -> BTreeSet<u32> {
        if self.is(Mistake::LiveOnly) { self.live.clone() } else { &self.live | &self.taken }
    }

    fn batch_step(&mut self) {
        let Some((at, pages, bits)) = self.batch.clone() else {
            // Now and then only to clear what was committed.
            let sweep = self.random.below(8) == 0;
            if self.intent.wants_batch() || sweep {
                self.intent.begin_batch();
                let mut pages: BTreeSet<u32> =
                    self.intent.leaving().map(|region| region / PAGE_REGIONS).collect();
                if sweep {
                    pages.insert(self.random.below(PAGES));
                }
                self.batch = Some((0, pages, BTreeSet::new()));
            }
            return;
        };
        let mut bits = bits;
        match BATCH.get(at) {
            Some(Io::Capture) => bits = self.captured(),
            Some(Io::FlushBacking) => {
                let needed = self.intent.leaving().next().is_some();
                if needed
                    && !self.is(Mistake::BackingUnflushed)
                    && !self.flush_is_over(Flush::Batch, true)
                {
                    return;
                }
            }
            Some(Io::WritePages) => {
                let page_blocks = PAGE_REGIONS * REGION_BLOCKS;
                for page in &pages {
                    let blocks = page * page_blocks..(page + 1) * page_blocks;
                    self.pages.write(*page as usize, bits.range(blocks).copied().collect());
                }
            }
            Some(_) => {
                if !self.is(Mistake::PagesUnflushed) && !self.flush_is_over(Flush::Batch, false) {
                    return;
                }
            }
            None => {
                self.batch = None;
                self.intent.batched();
                return;
            }
        }
        self.batch = Some((at + 1, pages, bits));
    }

    fn agent_step(&mut self) {
        match self.random.below(8) {
            // A pass; the target has it when the cut is committed.
            0..=3 => {
                let all: Vec<u32> = self.live.iter().copied().collect();
                for block in all {
                    if self.random.below(3) > 0 {
                        self.taken.insert(block);
                        self.live.remove(&block);
                        self.staged.push((block, self.backing.read(block as usize)));
                    }
                }
            }
            4..=5 => {
                // Only what was let through before is settled: a write in flight was marked again.
                for write in self.writes.iter().flatten().filter(|w| matches!(w.at, At::Down(_))) {
                    if !self.is(Mistake::NoSecondMark) {
                        self.live.extend(write.first..write.first + write.count);
                    }
                }
                for (block, content) in std::mem::take(&mut self.staged) {
                    self.target[block as usize] = content;
                }
                // The acknowledgement may be late: then the bits stay for now.
                if self.random.below(3) > 0 {
                    self.taken.clear();
                }
            }
            6 => {
                self.live.append(&mut self.taken);
                self.staged.clear();
            }
            _ => {}
        }
    }

    fn newest(&self) -> Record {
        let (one, other) = (self.records.read(0), self.records.read(1));
        if one.0 > other.0 { one } else { other }
    }

    fn power_cut(&mut self) -> Result<(), String> {
        self.cuts += 1;
        self.backing.power_cut(&mut self.random);
        self.records.power_cut(&mut self.random);
        self.pages.power_cut(&mut self.random);
        let (_, active) = self.newest();
        let mut dirty: BTreeSet<u32> =
            (0..PAGES).flat_map(|page| self.pages.read(page as usize)).collect();
        for region in &active {
            dirty.extend(region * REGION_BLOCKS..(region + 1) * REGION_BLOCKS);
        }
        for block in 0..BLOCKS {
            let (medium, target) = (self.backing.read(block as usize), self.target[block as usize]);
            if medium != target && !dirty.contains(&block) {
                return Err(format!(
                    "power cut {}: block {block} has {medium} on the medium and {target} on the target, and is clean",
                    self.cuts
                ));
            }
        }
        (self.live, self.taken) = (dirty, BTreeSet::new());
        self.staged.clear();
        self.writes = vec![None; REQUESTS];
        self.start();
        Ok(())
    }

    /// The filter dies: its I/O ends, and what was not acknowledged is issued again.
    fn kill(&mut self) {
        let old = self.writes.clone();
        // Marked when it takes over: somebody may have read it.
        for write in old.iter().flatten().filter(|write| matches!(write.at, At::Down(_))) {
            self.live.extend(write.first..write.first + write.count);
        }
        self.start();
        for (request, write) in old.into_iter().enumerate() {
            self.writes[request] = write.map(|write| Write { at: At::Waits, ..write });
            self.admit(request);
        }
    }

    fn start(&mut self) {
        (self.record, self.batch) = (None, None);
        self.flushing.clear();
        let (number, active) = self.newest();
        self.number = number + 1;
        self.records.write((self.number % 2) as usize, (self.number, active.clone()));
        if !self.is(Mistake::TrustUnflushed) {
            self.records.flush(self.records.written);
            self.pages.flush(self.pages.written);
        }
        self.intent = Intent::new(PLACES, REQUESTS, &active, bug_of(self.mistake));
    }

    /// Everything that is under way comes to an end, or somebody waits for ever.
    fn drain(&mut self) -> Result<(), String> {
        for _ in 0..20_000 {
            if self.writes.iter().all(Option::is_none) {
                return Ok(());
            }
            match self.random.below(3) {
                0 => self.progress(),
                1 => self.record_step(),
                _ => self.batch_step(),
            }
        }
        Err(format!("somebody waits for ever: {:?}", self.intent))
    }
}

fn bug_of(mistake: Option<Mistake>) -> Option<Bug> {
    match mistake {
        Some(Mistake::Machine(bug)) => Some(bug),
        _ => None,
    }
}

fn run(seed: u64, mistake: Option<Mistake>) -> Result<(u32, u64), String> {
    let mut world = World::new(seed, mistake);
    let mut done = || -> Result<(), String> {
        for step in 0..STEPS {
            world.step()?;
            if step % 500 == 499 {
                world.drain()?;
            }
        }
        Ok(())
    };
    done().map_err(|why| format!("seed {seed}: {why}"))?;
    Ok((world.cuts, world.listed))
}

fn seeds(most: u64) -> std::ops::Range<u64> {
    match std::env::var("SECONDSITE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None if std::env::var_os("SECONDSITE_LONG").is_some() => 1..1 + most * 50,
        None => 1..1 + most,
    }
}

#[test]
fn after_a_power_cut_all_that_differs_is_dirty_or_in_an_active_region() {
    let (mut cuts, mut records) = (0, 0);
    for seed in seeds(300) {
        let (c, r) = run(seed, None).unwrap_or_else(|why| panic!("{why}"));
        (cuts, records) = (cuts + c, records + r);
    }
    eprintln!("{cuts} power cuts, {records} records");
}

#[test]
fn each_mistake_is_noticed() {
    let all = [
        Mistake::Machine(Bug::LeaveAnyway),
        Mistake::Machine(Bug::LeaveInFlight),
        Mistake::Machine(Bug::LeaveEarly),
        Mistake::Machine(Bug::HoldSome),
        Mistake::RecordUnflushed,
        Mistake::PagesUnflushed,
        Mistake::BackingUnflushed,
        Mistake::LiveOnly,
        Mistake::LeaveAtSubmit,
        Mistake::NoSecondMark,
        Mistake::TrustUnflushed,
    ];
    for mistake in all {
        let found = (1..400).find_map(|seed| run(seed, Some(mistake)).err());
        let why = found.unwrap_or_else(|| panic!("{mistake:?} is not noticed"));
        eprintln!("{mistake:?}: {why}");
    }
}
