//! The bytes of pinned memory: the header and the order of the bits. They may change only together
//! with the header's version.
//!
//! `SECONDSITE_BLESS=1 cargo test --release -p secondsite-tracker --test golden` writes the file
//! anew; do that only for a new version.

use secondsite_tracker::header::{CutSlot, HEADER_WORDS, Header, State};
use secondsite_tracker::marks::{BlockRun, Marks, MarksMemory};
use secondsite_tracker::sync::Memory;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

type Words = &'static [AtomicU64];

/// Words that outlive the marks over them.
fn words(count: usize) -> Words {
    Box::leak((0..count).map(|_| AtomicU64::new(0)).collect())
}

fn values(words: Words) -> Vec<u64> {
    words.iter().map(|word| word.load(Relaxed)).collect()
}

/// Every field has a value of its own, and both slots of each pair were written.
fn example() -> Words {
    let words = words(HEADER_WORDS);
    let header = Header::new(words);
    header.set_blocks(0x0102_0304_0506);
    header.set_compare_due(true);
    header.set_identity(std::array::from_fn(|at| 0x1d00 + at as u64));
    let cut = |epoch, state| CutSlot {
        epoch,
        cut_id: std::array::from_fn(|at| 0xc0 + at as u8),
        state,
        acknowledged: (epoch - 1, std::array::from_fn(|at| 0xa0 + at as u8)),
    };
    header.set_cut(cut(6, State::Committed));
    header.set_cut(cut(7, State::Stands));
    header.set_baseline(std::array::from_fn(|at| 0xb0 + at as u64));
    header.set_baseline(std::array::from_fn(|at| 0xb100 + at as u64));
    header.set_whole(true);
    words
}

#[test]
fn the_header_has_its_golden_bytes() {
    let bytes: Vec<u8> = values(example()).iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(bytes.len(), 512);
    let row = |row: &[u8]| row.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    let hex: String = bytes.chunks(16).map(|chunk| row(chunk) + "\n").collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/header.hex");
    if std::env::var_os("SECONDSITE_BLESS").is_some() {
        std::fs::write(path, &hex).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap();
    assert_eq!(golden, hex, "the bytes changed");

    // The file itself is read back.
    let digits: Vec<u8> =
        golden.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let words: Vec<AtomicU64> = digits
        .chunks_exact(8)
        .map(|word| AtomicU64::new(u64::from_le_bytes(word.try_into().unwrap())))
        .collect();
    let (header, example) = (Header::new(&words), Header::new(example()));
    assert!(header.is_whole() && header.is_sound() && header.newer().is_none());
    assert_eq!(header.blocks(), 0x0102_0304_0506);
    assert!(header.compare_due());
    assert_eq!((header.cut().epoch, header.cut().state), (7, State::Stands));
    assert_eq!(header.cut(), example.cut());
    assert_eq!(header.identity(), example.identity());
    assert_eq!(header.baseline(), example.baseline());
}

#[test]
fn a_newer_header_is_told_from_one_that_is_not_whole() {
    let words = example();
    for (first, newer) in [
        (u64::from_le_bytes(*b"SSMARK\x04\0"), Some(4)),
        (u64::from_le_bytes(*b"SSMARK\xff\xff"), Some(u16::MAX)),
        (u64::from_le_bytes(*b"SSMARK\0\0"), None),
        (u64::from_le_bytes(*b"SSMARX\x03\0"), None),
        (0, None),
    ] {
        words[0].store(first, Relaxed);
        let header = Header::new(words);
        assert_eq!((header.newer(), header.is_whole()), (newer, false), "{first:#x}");
    }
}

/// A state that no version wrote must not end the process that finds it: it is not adopted.
#[test]
fn a_state_without_a_meaning_is_not_sound() {
    let words = example();
    for slot in [8 + 3, 16 + 3] {
        words[slot].store(4, Relaxed);
    }
    assert!(!Header::new(words).is_sound());
    for selector in [3, 4] {
        let words = example();
        assert!(Header::new(words).is_sound());
        words[selector].store(u64::MAX, Relaxed);
        assert!(!Header::new(words).is_sound(), "a selector that cannot grow");
    }
}

/// Block 64 w + b is bit b of word w, in both leaf bitmaps; a summary bit stands for 64 words.
#[test]
fn the_bits_stand_in_their_order() {
    const BLOCKS: u64 = 64 * 64 * 3;
    let (header, live, summary, taken) = (words(HEADER_WORDS), words(192), words(1), words(192));
    let memory = MarksMemory {
        header: Memory::new(header),
        live: Memory::new(live),
        summary: Memory::new(summary),
        taken: Memory::new(taken),
    };
    let marks = Marks::open(BLOCKS, memory);
    for block in [0, 63, 64 + 1, 64 * 64 * 2 + 5] {
        marks.mark(BlockRun { first: block, count: 1 });
    }
    let mut due = vec![0; 192];
    (due[0], due[1], due[128]) = (1 | 1 << 63, 1 << 1, 1 << 5);
    assert_eq!((values(live), values(summary)), (due.clone(), vec![0b101]));
    marks.begin(1, [1; 16]);
    marks.take(u64::MAX, &mut Vec::new());
    assert_eq!((values(live), values(taken)), (vec![0; 192], due));
}
