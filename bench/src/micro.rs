//! The steps of the data path on one thread: what each costs beside its alternative.

use crate::turns::{Case, Group};
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_format::frame::{Frame, FrameHeader, FrameKind, RawHeader};
use secondsite_format::limits::FRAME_PAYLOAD_BYTES_MAX;
use secondsite_tracker::marks::{BlockRun, Marks};
use std::sync::Mutex;

const MIB: f64 = (1 << 20) as f64;
/// Frames a round; enough to be out of the nearest caches.
const FRAMES: usize = 16;
const PAYLOAD_MIB: f64 = (FRAMES * FRAME_PAYLOAD_BYTES_MAX) as f64 / MIB;
/// Blocks of the bitmaps: 1 TiB at 4 KiB.
const BLOCKS: u64 = 1 << 28;
/// Marks a round, scattered.
const MARKS: u64 = 100_000;

/// All groups.
pub fn measure(rounds: usize) -> Vec<Group> {
    vec![
        digests(rounds),
        compression(rounds),
        frames(rounds),
        marking_again(rounds),
        marking(rounds),
        taking(rounds),
        clean_scan(rounds),
    ]
}

/// What blocks of real disks look like, roughly.
#[derive(Clone, Copy)]
enum BlockKind {
    Random,
    Text,
    Sparse,
}

fn payload(kind: BlockKind) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words = ["block ", "volume ", "epoch ", "cut ", "journal ", "replica ", "point\n", "of "];
    let mut bytes = Vec::with_capacity(FRAMES * FRAME_PAYLOAD_BYTES_MAX + 8);
    while bytes.len() < FRAMES * FRAME_PAYLOAD_BYTES_MAX {
        match kind {
            BlockKind::Random => bytes.extend(next().to_le_bytes()),
            BlockKind::Text => bytes.extend(words[next() as usize % words.len()].as_bytes()),
            // One word in eight is set, as in tables and bitmaps.
            BlockKind::Sparse => {
                bytes.extend(if next() % 8 == 0 { next().to_le_bytes() } else { [0; 8] });
            }
        }
    }
    bytes.truncate(FRAMES * FRAME_PAYLOAD_BYTES_MAX);
    bytes
}

fn digests(rounds: usize) -> Group {
    let bytes = payload(BlockKind::Random);
    let each = |digest: fn(&[u8]) -> u64| {
        let bytes = &bytes;
        move || bytes.chunks(FRAME_PAYLOAD_BYTES_MAX).map(digest).fold(0, u64::wrapping_add)
    };
    let cases = vec![
        Case::new("copy, 1 MiB (baseline)", each(|chunk| chunk.to_vec()[7].into())),
        Case::new("xxh3-128, 1 MiB", each(|chunk| xxhash_rust::xxh3::xxh3_128(chunk) as u64)),
        Case::new("blake3, 1 MiB", each(|chunk| blake3::hash(chunk).as_bytes()[0].into())),
        Case::new("blake3, 4 KiB each", {
            each(|chunk| chunk.chunks(4096).map(|b| u64::from(blake3::hash(b).as_bytes()[0])).sum())
        }),
    ];
    Group::measure("Digests", "MiB/s", PAYLOAD_MIB, rounds, cases)
}

fn compression(rounds: usize) -> Group {
    let case = |name, kind| {
        let bytes = payload(kind);
        let mut out = vec![0; lz4_flex::block::get_maximum_output_size(FRAME_PAYLOAD_BYTES_MAX)];
        Case::new(name, move || {
            let chunks = bytes.chunks(FRAME_PAYLOAD_BYTES_MAX);
            let mut pack = |c| lz4_flex::block::compress_into(c, &mut out).expect("it fits");
            chunks.map(|chunk| pack(chunk) as u64).sum()
        })
    };
    let cases = vec![
        case("lz4, random bytes (baseline)", BlockKind::Random),
        case("lz4, text", BlockKind::Text),
        case("lz4, tables with gaps", BlockKind::Sparse),
    ];
    Group::measure("Compression, 1 MiB", "MiB/s", PAYLOAD_MIB, rounds, cases)
}

fn frames(rounds: usize) -> Group {
    let bytes = payload(BlockKind::Text);
    let contents: Vec<Content> = bytes.chunks(FRAME_PAYLOAD_BYTES_MAX).map(content).collect();
    let made: Vec<Frame> = contents.iter().map(frame).collect();
    let cases = vec![
        Case::new("digest of the content (baseline)", || {
            contents.iter().map(|content| u64::from(content.digest()[0])).sum()
        }),
        Case::new("encode: lz4, header, xxh3", || {
            contents.iter().map(|content| frame(content).total_bytes()).sum()
        }),
        Case::new("decode: header, xxh3, lz4, checks", || {
            let read = |made: &Frame| {
                let raw = RawHeader::parse(made.header_bytes()).expect("our own header");
                let frame = raw.with_body(made.body.clone()).expect("our own body");
                let content = Content::decode(&frame.body, u64::MAX).expect("our own content");
                content.payload().len() as u64
            };
            made.iter().map(read).sum()
        }),
    ];
    Group::measure("Frames of 256 extents, text", "MiB/s", PAYLOAD_MIB, rounds, cases)
}

/// 256 scattered extents of 4 KiB.
fn content(payload: &[u8]) -> Content {
    let extent = |i| Extent { offset: i * 65536, bytes: 4096, kind: ExtentKind::Data };
    let extents = (0..payload.len() as u64 / 4096).map(extent).collect();
    Content::new(extents, payload.to_vec()).expect("rising extents")
}

fn frame(content: &Content) -> Frame {
    Frame::new(FrameHeader::message(FrameKind::Data), content.encode())
}

/// Scattered block numbers, the same in every round.
fn places() -> impl Iterator<Item = u64> {
    (0..MARKS).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % BLOCKS)
}

fn bitset() -> Mutex<Vec<u64>> {
    Mutex::new(vec![0; (BLOCKS / 64) as usize])
}

fn mark_locked(set: &Mutex<Vec<u64>>) -> u64 {
    for block in places() {
        set.lock().expect("no panic")[(block / 64) as usize] |= 1 << (block % 64);
    }
    0
}

fn mark_all(marks: &Marks) -> u64 {
    for first in places() {
        marks.mark(BlockRun { first, count: 1 });
    }
    0
}

/// Blocks that a busy application writes again and again.
const WARM: u64 = 4096;

fn marking_again(rounds: usize) -> Group {
    let (set, marks) = (bitset(), Marks::in_memory(BLOCKS));
    let again = || (0..MARKS).map(|i| i * 7 % WARM);
    let cases = vec![
        Case::new("Mutex<Vec<u64>> (baseline)", || {
            for block in again() {
                set.lock().expect("no panic")[(block / 64) as usize] |= 1 << (block % 64);
            }
            0
        }),
        Case::new("live bitmap", || {
            again().for_each(|first| marks.mark(BlockRun { first, count: 1 }));
            0
        }),
    ];
    Group::measure("Marking what is marked already", "marks/s", MARKS as f64, rounds, cases)
}

fn marking(rounds: usize) -> Group {
    let (set, marks) = (bitset(), Marks::in_memory(BLOCKS));
    let cases = vec![
        Case::new("Mutex<Vec<u64>> (baseline)", || mark_locked(&set)),
        Case::new("live bitmap, marked before", || mark_all(&marks)),
    ];
    Group::measure(
        "Marking 100,000 scattered of 2^28 blocks",
        "marks/s",
        MARKS as f64,
        rounds,
        cases,
    )
}

fn taking(rounds: usize) -> Group {
    let (set, marks) = (bitset(), Marks::in_memory(BLOCKS));
    let mut epoch = 0;
    let cases = vec![
        Case::new("Mutex<Vec<u64>>, mark and scan (baseline)", || {
            mark_locked(&set);
            let mut found = 0;
            for word in set.lock().expect("no panic").iter_mut().filter(|word| **word != 0) {
                found += u64::from(std::mem::take(word).count_ones());
            }
            found
        }),
        Case::new("bitmaps: mark, begin, take, commit", || {
            mark_all(&marks);
            epoch += 1;
            let mut cut_id = [1; 16];
            cut_id[..8].copy_from_slice(&u64::to_le_bytes(epoch));
            marks.begin(epoch, cut_id);
            let taken = marks.take(u64::MAX, &mut Vec::new());
            marks.committed(cut_id);
            taken
        }),
    ];
    Group::measure(
        "Marking and taking 100,000 of 2^28 blocks",
        "blocks/s",
        MARKS as f64,
        rounds,
        cases,
    )
}

fn clean_scan(rounds: usize) -> Group {
    let (set, marks) = (bitset(), Marks::in_memory(BLOCKS));
    marks.begin(1, [1; 16]);
    let cases = vec![
        Case::new("Mutex<Vec<u64>>, every word (baseline)", || {
            set.lock().expect("no panic").iter().map(|word| u64::from(word.count_ones())).sum()
        }),
        Case::new("take by the summary", || marks.take(u64::MAX, &mut Vec::new())),
        Case::new("proof: every leaf of the live bitmap", || marks.live_is_clear().into()),
    ];
    Group::measure("Scanning 2^28 clean blocks (1 TiB)", "scans/s", 1.0, rounds, cases)
}
