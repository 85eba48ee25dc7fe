//! A volume grows while programs mark, and the process dies between any two of its steps. Whatever
//! was written before, meanwhile or after, and all of the new part, must be shipped by the cut
//! after the next start; of the old part nothing else.

mod mortal;

use mortal::{Mortal, beside, dies_after, step, words};
use secondsite_tracker::grow::{Extent, Sets, grow};
use secondsite_tracker::marks::{BlockRun, Marks, MarksMemory};
use secondsite_tracker::sync::Memory;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const BLOCK_BYTES: u32 = 4096;
const BLOCK_SECTORS: u64 = 8;
/// The last block is not a whole one.
const OLD_SECTORS: u64 = 200 * BLOCK_SECTORS - 3;
const NEW_SECTORS: u64 = 700 * BLOCK_SECTORS - 1;
/// What it may have grown to when the next process starts.
const LATER_SECTORS: u64 = 5000 * BLOCK_SECTORS;
const SEEDS: u64 = 12;

type Words = Arc<[Mortal]>;

/// Live, summary, taken.
type Set = [Words; 3];

fn set_of(blocks: u64) -> Set {
    let leaves = blocks.div_ceil(64) as usize;
    [words(leaves), words(leaves.div_ceil(64 * 64)), words(leaves)]
}

/// A program that has looked where to mark, and has not marked yet.
struct Run {
    bound: u64,
    live: Words,
    block: u64,
}

/// What outlives the process: pinned memory, and programs that mark all along.
struct Kernel {
    header: Words,
    sets: RefCell<[Option<Set>; 2]>,
    marking: RefCell<Words>,
    flying: RefCell<Vec<Run>>,
    /// Blocks written.
    written: RefCell<BTreeSet<u64>>,
    device_blocks: Cell<u64>,
    random: Cell<u64>,
}

impl Kernel {
    fn new(seed: u64) -> Rc<Self> {
        let old = Extent { sectors: OLD_SECTORS, set: 0 };
        let set = set_of(old.blocks(BLOCK_BYTES));
        let header = words(64);
        header[5].0.store(OLD_SECTORS, Ordering::Relaxed);
        header[6].0.store(OLD_SECTORS << 1, Ordering::Relaxed);
        Rc::new(Self {
            header,
            marking: RefCell::new(set[0].clone()),
            sets: RefCell::new([Some(set), None]),
            flying: RefCell::default(),
            written: RefCell::default(),
            device_blocks: Cell::new(NEW_SECTORS.div_ceil(BLOCK_SECTORS)),
            random: Cell::new(seed * 2 + 1),
        })
    }

    fn below(&self, end: u64) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        (x >> 11) % end
    }

    /// A program begins, or one ends.
    fn moment(&self) {
        match self.below(4) {
            0 => {
                let bound = self.header[5].0.load(Ordering::Relaxed);
                let live = self.marking.borrow().clone();
                let block = self.below(self.device_blocks.get());
                self.flying.borrow_mut().push(Run { bound, live, block });
            }
            1 => {
                let count = self.flying.borrow().len() as u64;
                if count > 0 {
                    let run = self.flying.borrow_mut().remove(self.below(count) as usize);
                    self.end(&run);
                }
            }
            _ => {}
        }
    }

    fn end(&self, run: &Run) {
        let inside = run.block * BLOCK_SECTORS < run.bound;
        if let (true, Some(word)) = (inside, run.live.get(run.block as usize / 64)) {
            word.0.fetch_or(1 << (run.block % 64), Ordering::Relaxed);
        }
        self.written.borrow_mut().insert(run.block);
    }

    fn end_all(&self) {
        let flying = std::mem::take(&mut *self.flying.borrow_mut());
        flying.iter().for_each(|run| self.end(run));
    }

    fn memory(&self, set: usize) -> MarksMemory<Mortal> {
        let [live, summary, taken] = self.sets.borrow()[set].clone().expect("it is pinned");
        MarksMemory {
            header: Memory::new(self.header.clone()),
            live: Memory::new(live),
            summary: Memory::new(summary),
            taken: Memory::new(taken),
        }
    }
}

struct Pins(Rc<Kernel>);

impl Sets<Mortal> for Pins {
    type Error = Infallible;
    fn make(&mut self, extent: Extent) -> Result<(), Infallible> {
        self.remove(extent.set)?;
        step();
        self.0.sets.borrow_mut()[extent.set] = Some(set_of(extent.blocks(BLOCK_BYTES)));
        step();
        Ok(())
    }
    fn open(&self, extent: Extent) -> Result<MarksMemory<Mortal>, Infallible> {
        let memory = self.0.memory(extent.set);
        assert_eq!(memory.live.len() as u64, extent.blocks(BLOCK_BYTES).div_ceil(64));
        Ok(memory)
    }
    fn switch(&mut self, extent: Extent) -> Result<(), Infallible> {
        step();
        *self.0.marking.borrow_mut() =
            self.0.sets.borrow()[extent.set].clone().expect("it is pinned")[0].clone();
        step();
        // As the kernel does: it returns when all that ran have ended.
        self.0.end_all();
        step();
        Ok(())
    }
    fn remove(&mut self, set: usize) -> Result<(), Infallible> {
        step();
        self.0.sets.borrow_mut()[set] = None;
        step();
        Ok(())
    }
}

fn blocks_of(runs: &[BlockRun]) -> BTreeSet<u64> {
    runs.iter().flat_map(|run| run.first..run.first + run.count).collect()
}

/// Grows, killed after `steps`, then again to the end. Whether it was killed at all.
fn killed_after(seed: u64, steps: u64) -> bool {
    let kernel = Kernel::new(seed);
    let old_blocks = OLD_SECTORS.div_ceil(BLOCK_SECTORS);
    // A cut stands and holds taken blocks; others are live.
    let marks = Marks::open(old_blocks, kernel.memory(0));
    let mut due: BTreeSet<u64> = (0..30).map(|i| (i * 7 + seed) % (old_blocks - 1)).collect();
    due.iter().for_each(|block| marks.mark(BlockRun { first: *block, count: 1 }));
    marks.begin(5, [5; 16]);
    marks.take(10, &mut Vec::new());
    drop(marks);

    let of_kernel = kernel.clone();
    beside(Some(Rc::new(move || of_kernel.moment())));
    let killed = !dies_after(steps, || {
        let Ok(_) = grow(&mut Pins(kernel.clone()), &kernel.header, BLOCK_BYTES, NEW_SECTORS);
    });
    (0..20).for_each(|_| kernel.moment());
    let sectors = if seed.is_multiple_of(3) { LATER_SECTORS } else { NEW_SECTORS };
    kernel.device_blocks.set(sectors.div_ceil(BLOCK_SECTORS));
    let Ok(extent) = grow(&mut Pins(kernel.clone()), &kernel.header, BLOCK_BYTES, sectors);
    beside(None);
    kernel.end_all();

    assert_eq!(extent.sectors, sectors);
    assert!(kernel.sets.borrow()[1 - extent.set].is_none(), "the old set is gone");
    let blocks = extent.blocks(BLOCK_BYTES);
    let marks = Marks::open(blocks, kernel.memory(extent.set));
    assert!(!marks.cut().stands && marks.taken_count() == 0, "the cut was given up");
    assert_eq!(marks.cut().epoch, 5);
    marks.begin(6, [6; 16]);
    let mut out = Vec::new();
    marks.take(u64::MAX, &mut out);
    let got = blocks_of(&out);
    due.extend(kernel.written.borrow().iter());
    due.extend(old_blocks - 1..blocks);
    let when = format!("seed {seed}, killed after {steps}");
    assert_eq!(due.difference(&got).next(), None, "{when}: lost");
    assert_eq!(got.difference(&due).next(), None, "{when}: sent for nothing");
    assert!(marks.live_is_clear());

    // What is written from now on is marked up to the new end.
    kernel.written.borrow_mut().clear();
    (0..40).for_each(|_| kernel.moment());
    kernel.end_all();
    for block in kernel.written.borrow().iter() {
        assert!(marks.holds(BlockRun { first: *block, count: 1 }), "{when}: {block}");
    }
    assert!(marks.committed([6; 16]));
    let held = (0..blocks).filter(|block| marks.holds(BlockRun { first: *block, count: 1 }));
    assert_eq!(held.count(), kernel.written.borrow().len(), "{when}");
    killed
}

#[test]
fn a_kill_at_any_step_of_growing_loses_no_mark() {
    let seeds = match std::env::var("SECONDSITE_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    for seed in seeds {
        let steps = (0..).take_while(|steps| killed_after(seed, *steps)).count();
        assert!(steps > 50, "{steps} steps: it is killed in all of them");
    }
}
