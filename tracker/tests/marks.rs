//! Marks against a plain set of blocks, also when the process dies between any two instructions.

#[expect(dead_code, reason = "`growth` uses all of it")]
mod mortal;

use mortal::{Mortal, dies_after, words};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use secondsite_tracker::marks::{BlockRun, Marks, MarksMemory};
use secondsite_tracker::sync::Memory;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Several groups of leaf words, the last one not full.
const BLOCKS: u64 = 3 * 64 * 64 + 77;

/// Memory that outlives the process.
struct Pinned([Arc<[Mortal]>; 4]);

impl Pinned {
    fn new() -> Self {
        let leaves = BLOCKS.div_ceil(64) as usize;
        Self([64, leaves, 1, leaves].map(words))
    }

    fn open(&self) -> Marks<Mortal> {
        let [header, live, summary, taken] =
            self.0.each_ref().map(|words| Memory::new(words.clone()));
        Marks::open(BLOCKS, MarksMemory { header, live, summary, taken })
    }
}

#[derive(Debug, Clone)]
enum Event {
    Mark(BlockRun),
    Begin,
    Take(u64),
    GiveUp,
    Committed,
    CommittedOther,
}

fn event() -> impl Strategy<Value = Event> {
    let run = (0..BLOCKS, prop_oneof![1..4u64, 1..9000u64]);
    prop_oneof![
        4 => run.prop_map(|(first, count)| Event::Mark(BlockRun { first, count })),
        3 => Just(Event::Begin),
        4 => prop_oneof![Just(u64::MAX), 0..200u64].prop_map(Event::Take),
        1 => Just(Event::GiveUp),
        2 => Just(Event::Committed),
        1 => Just(Event::CommittedOther),
    ]
}

fn blocks_of(runs: &[BlockRun]) -> BTreeSet<u64> {
    assert!(runs.windows(2).all(|pair| pair[0].first + pair[0].count < pair[1].first), "order");
    runs.iter().flat_map(|run| run.first..run.first + run.count).collect()
}

/// The naive model: three sets and a flag.
#[derive(Default)]
struct Oracle {
    live: BTreeSet<u64>,
    taken: BTreeSet<u64>,
    stands: bool,
    epoch: u64,
    acknowledged: u64,
}

impl Oracle {
    fn id(&self) -> [u8; 16] {
        (u128::from(self.epoch) * 7 + 1).to_le_bytes()
    }

    fn apply(&mut self, event: &Event, marks: &Marks<Mortal>) {
        match *event {
            Event::Mark(run) => {
                marks.mark(run);
                self.live.extend(run.first..(run.first + run.count).min(BLOCKS));
            }
            Event::Begin if self.stands => {}
            Event::Begin => {
                self.epoch += 1;
                self.stands = true;
                marks.begin(self.epoch, self.id());
            }
            Event::Take(max) => {
                let mut out = Vec::new();
                let count = marks.take(max, &mut out);
                let got = blocks_of(&out);
                assert_eq!(got.len() as u64, count);
                let limit = if self.stands { max.min(self.live.len() as u64) } else { 0 };
                let want: BTreeSet<u64> = self.live.iter().copied().take(limit as usize).collect();
                assert_eq!(got, want);
                self.live.retain(|block| !got.contains(block));
                self.taken.extend(got);
            }
            Event::GiveUp => {
                marks.give_up();
                self.stands = false;
                self.live.append(&mut self.taken);
            }
            Event::Committed => {
                let done = marks.committed(self.id());
                assert!(!self.stands || done);
                if self.stands {
                    self.taken.clear();
                    self.acknowledged = self.epoch;
                }
                self.stands = false;
            }
            Event::CommittedOther => assert!(!marks.committed([0xee; 16])),
        }
    }

    fn check(&self, marks: &Marks<Mortal>) {
        assert_eq!(marks.live_count(), self.live.len() as u64);
        assert_eq!(marks.taken_count(), self.taken.len() as u64);
        assert_eq!(marks.live_is_clear(), self.live.is_empty());
        assert_eq!((marks.cut().stands, marks.cut().epoch), (self.stands, self.epoch));
        assert_eq!(marks.acknowledged().0, self.acknowledged);
        for block in self.live.iter().chain(&self.taken).take(20) {
            assert!(marks.holds(BlockRun { first: *block, count: 1 }));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn marks_are_the_set(events in proptest::collection::vec(event(), 1..40)) {
        let marks = Pinned::new().open();
        let mut oracle = Oracle::default();
        for event in &events {
            oracle.apply(event, &marks);
            oracle.check(&marks);
        }
    }

    /// The process dies in the middle of the last event. Whatever was marked and is not held by an
    /// acknowledged epoch must be shipped by the cut after the next start.
    #[test]
    fn a_kill_at_any_step_loses_no_mark(
        events in proptest::collection::vec(event(), 1..12), last in event(), steps in any::<u16>()
    ) {
        let memory = Pinned::new();
        let marks = memory.open();
        let mut oracle = Oracle::default();
        for event in &events {
            oracle.apply(event, &marks);
        }
        let mut due: BTreeSet<u64> = oracle.live.union(&oracle.taken).copied().collect();
        let committing = matches!(last, Event::Committed) && oracle.stands;
        let epoch = oracle.epoch;
        dies_after(u64::from(steps) % 2000, || oracle.apply(&last, &marks));
        drop(marks);

        let marks = memory.open();
        if committing && marks.acknowledged().0 == epoch {
            due = BTreeSet::new();
            // Taken is gone; live stays due.
            due.extend(oracle.live.iter().copied());
        }
        // The start of a daemon: what a dead one had read is read again.
        marks.give_up();
        assert_eq!(marks.taken_count(), 0);
        marks.begin(epoch + 2, [9; 16]);
        let mut out = Vec::new();
        marks.take(u64::MAX, &mut out);
        let got = blocks_of(&out);
        assert!(due.is_subset(&got), "lost: {:?}", due.difference(&got).next());
        assert!(marks.live_is_clear());
    }
}

/// A process that dies in a take leaves leaves under summary bits that it has cleared: the first
/// take of the next one has to look at all of them.
#[test]
fn what_a_take_killed_at_any_step_leaves_is_taken_by_the_next_process() {
    let due: BTreeSet<u64> = [0, 63, 64 * 64 - 1, 64 * 64, BLOCKS - 1].into();
    for steps in 0.. {
        let memory = Pinned::new();
        let marks = memory.open();
        due.iter().for_each(|block| marks.mark(BlockRun { first: *block, count: 1 }));
        marks.begin(1, [1; 16]);
        let ended = dies_after(steps, || {
            marks.take(u64::MAX, &mut Vec::new());
        });
        drop(marks);

        let marks = memory.open();
        marks.give_up();
        marks.begin(2, [2; 16]);
        let mut out = Vec::new();
        marks.take(u64::MAX, &mut out);
        assert_eq!(blocks_of(&out), due, "killed after {steps}");
        if ended {
            assert!(steps > 200, "{steps} steps: it is killed in all of them");
            break;
        }
    }
}

#[test]
#[should_panic(expected = "taken bitmap is not clear")]
fn a_cut_never_begins_over_a_taken_bitmap() {
    let memory = Pinned::new();
    memory.open();
    memory.0[3][5].0.store(1, Ordering::Relaxed);
    // The header names no cut that took it; only the check of `begin` itself is left.
    let marks = memory.open();
    memory.0[3][5].0.store(1, Ordering::Relaxed);
    marks.begin(1, [1; 16]);
}

#[test]
fn the_header_is_these_bytes() {
    let memory = Pinned::new();
    let marks = memory.open();
    marks.begin(1, [0x11; 16]);
    assert!(marks.committed([0x11; 16]));
    marks.begin(2, std::array::from_fn(|at| at as u8));
    marks.set_compare_due(true);
    let bytes: Vec<u8> =
        memory.0[0].iter().flat_map(|word| word.0.load(Ordering::Relaxed).to_le_bytes()).collect();
    assert_eq!(bytes.len(), 512);
    let mut want = vec![0u8; 512];
    want[8..16].copy_from_slice(&BLOCKS.to_le_bytes());
    want[16] = 1; // compare due
    want[24] = 3; // three flips: slot 1 counts
    // Slot 0: epoch 1 was committed, and acknowledged by the same flip.
    want[64] = 1;
    want[72..88].fill(0x11);
    want[88] = 3;
    want[96] = 1;
    want[104..120].fill(0x11);
    // Slot 1: epoch 2 stands.
    want[128] = 2;
    want[136..152].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|at| at as u8));
    want[152] = 1;
    want[160] = 1;
    want[168..184].fill(0x11);
    assert_eq!(bytes, want);
}
