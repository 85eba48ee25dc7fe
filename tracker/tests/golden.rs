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

/// A superblock, a record and a page of the bitmap, with a value of its own in every field.
#[test]
fn a_reserve_has_its_golden_bytes() {
    use secondsite_tracker::filter::reserve::{
        NotedCut, PAGE_BYTES, PageError, Record, Superblock, bits_are_whole, seal_bits,
    };
    let mut superblock = Superblock::new(64 << 20, "0123456789abcdef0123456789abcdef");
    let first = superblock.give("22222222222222222222222222222222", 1 << 40, 4096).unwrap();
    let second = superblock.give("data.1", 96 << 20, 65536).unwrap();
    assert!(first.start + first.bytes <= second.start && second.spill_slots > 16);
    superblock.number = 7;
    let record = Record {
        number: 8,
        void: false,
        compare_due: true,
        identity: 0x0102_0304_0506_0708,
        cut: NotedCut { cut: (9, [0xc1; 16]), stood: true, acknowledged: (8, [0xa1; 16]) },
        regions: vec![0, 3, 0x0102_0304],
    };
    let mut log = [0; PAGE_BYTES];
    record.encode(&mut log);
    let mut bits = [0; PAGE_BYTES];
    bits[..3].copy_from_slice(&[1, 0x80, 0xff]);
    seal_bits(&mut bits, 5);
    let superblock_page = superblock.encode();
    // What is not zero, by where it is.
    let rows = |page: &[u8]| -> String {
        let rows = page.chunks(16).enumerate().filter(|(_, row)| row.iter().any(|b| *b != 0));
        let hex = |row: &[u8]| row.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
        rows.map(|(at, row)| format!("{:04x}: {}\n", at * 16, hex(row))).collect()
    };
    let text =
        format!("superblock\n{}log\n{}bitmap\n{}", rows(&superblock_page), rows(&log), rows(&bits));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/reserve.hex");
    if std::env::var_os("SECONDSITE_BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), text, "the bytes changed");

    // Read back, each in its own place only, and with no byte changed.
    let blank = [0; PAGE_BYTES];
    let pair = |one: &[u8], other: &[u8]| [one, other].concat();
    let read = |pages: &[u8]| Superblock::decode(pages, 64 << 20);
    assert_eq!(read(&pair(&blank, &superblock_page)), Ok(superblock));
    assert_eq!(read(&pair(&superblock_page, &blank)), Err(PageError::Damaged));
    assert_eq!(read(&pair(&blank, &blank)), Err(PageError::Foreign));
    assert_eq!(Record::decode(&pair(&log, &blank)), Ok(record.clone()));
    assert_eq!(Record::decode(&pair(&blank, &blank)), Err(PageError::Foreign));
    let mut next = [0; PAGE_BYTES];
    Record { number: 9, ..record.clone() }.encode(&mut next);
    assert_eq!(Record::decode(&pair(&log, &next)).unwrap().number, 9);
    for at in 0..PAGE_BYTES {
        let mut torn = next;
        torn[at] ^= 1;
        let found = Record::decode(&pair(&log, &torn));
        assert!(matches!(found, Ok(Record { number: 8, .. }) | Err(PageError::Newer(_))), "{at}");
        let (mut torn, mut bits) = (superblock_page, bits);
        torn[at] ^= 1;
        bits[at] ^= 1;
        assert!(read(&pair(&blank, &torn)).is_err() && !bits_are_whole(&bits, 5), "{at}");
    }
    assert!(bits_are_whole(&bits, 5) && !bits_are_whole(&bits, 6));
}

#[test]
fn a_reserve_is_shared_until_it_is_full() {
    use secondsite_tracker::filter::reserve::{NoPart, Superblock};
    let mut small = Superblock::new(1 << 20, "");
    assert!(matches!(small.give("v", 1 << 30, 4096), Err(NoPart::TooSmall(_))));
    let mut reserve = Superblock::new(16 << 20, "");
    let mut given = Vec::new();
    let full = loop {
        match reserve.give(&format!("v{}", given.len()), 1 << 30, 4096) {
            Ok(part) => given.push(part),
            Err(why) => break why,
        }
    };
    assert!(matches!(full, NoPart::Full(_)) && given.len() >= 3, "{full} after {}", given.len());
    given.sort_by_key(|part| part.start);
    for pair in given.windows(2) {
        assert!(pair[0].start + pair[0].bytes <= pair[1].start);
    }
    // What is given back is given again.
    reserve.parts.retain(|part| part.id != "v1");
    assert!(reserve.give("again", 1 << 30, 4096).is_ok());
}
