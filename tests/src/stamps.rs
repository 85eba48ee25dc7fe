//! The write order as an oracle, with many writers: threads write stamped blocks all over several
//! devices, and what each had been told before it issued a write stands in that write.
//!
//! A stamped block holds its number, the highest number up to which every write had completed when
//! it was issued, and one block that its thread had just read: place and number. Numbers at one
//! place only rise, since a place is written by one thread at a time. So an image is a prefix of the
//! write order if, with H the highest "completed" in it, every place holds a number at least as high
//! as the newest write up to H there, and as any that some block of the image had read there.

use crate::load::{Aligned, Turn};
use crate::random::Random;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use xxhash_rust::xxh3::xxh3_64;

const BLOCK_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"stamped!";
/// Bytes of a stamp: eight numbers of 8 bytes, the last one a checksum of the others.
const STAMP_BYTES: usize = 64;

/// A stamped block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    number: u64,
    completed: u64,
    place: u64,
    read_place: u64,
    read_number: u64,
}

impl Stamp {
    fn encode(self, block: &mut [u8]) {
        block[..8].copy_from_slice(MAGIC);
        let fields =
            [self.number, self.completed, self.place, self.read_place, self.read_number];
        for (at, field) in fields.into_iter().enumerate() {
            block[8 + at * 8..16 + at * 8].copy_from_slice(&field.to_le_bytes());
        }
        // Every sector is of this write, or the block is torn.
        for sector in block[512..].chunks_mut(512) {
            sector[..8].copy_from_slice(&self.number.to_le_bytes());
        }
        let sum = xxh3_64(&block[..STAMP_BYTES - 8]);
        block[STAMP_BYTES - 8..STAMP_BYTES].copy_from_slice(&sum.to_le_bytes());
    }

    fn decode(block: &[u8]) -> Option<Self> {
        let number = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
        let whole = block[..8] == *MAGIC && number(STAMP_BYTES - 8) == xxh3_64(&block[..STAMP_BYTES - 8]);
        whole.then(|| Self {
            number: number(8),
            completed: number(16),
            place: number(24),
            read_place: number(32),
            read_number: number(40),
        })
    }

    /// Whether the sectors are of one write.
    fn is_torn(&self, block: &[u8]) -> bool {
        block[512..].chunks(512).any(|sector| sector[..8] != self.number.to_le_bytes())
    }
}

/// What was issued and what is done.
struct Order {
    /// By number: the place.
    places: Vec<u64>,
    /// Issued, not done.
    under_way: BTreeSet<u64>,
}

impl Order {
    fn completed(&self) -> u64 {
        let first = self.under_way.first().copied();
        first.unwrap_or(self.places.len() as u64) - 1
    }
}

/// The devices and what was written to them.
pub struct Stamps {
    devices: Vec<PathBuf>,
    places: u64,
    order: Arc<Mutex<Order>>,
    busy: Arc<Vec<Mutex<()>>>,
}

impl Stamps {
    /// Stamps number 0 at each place: the first `places` blocks of each device.
    pub fn new(devices: &[PathBuf], places: u64) -> Self {
        let all = devices.len() as u64 * places;
        for (device, path) in devices.iter().enumerate() {
            let file = direct(path);
            let mut block = Box::new(Aligned([0; BLOCK_BYTES]));
            for at in 0..places {
                let place = device as u64 * places + at;
                let stamp = Stamp { number: 0, completed: 0, place, read_place: 0, read_number: 0 };
                stamp.encode(&mut block.0);
                file.write_all_at(&block.0, at * BLOCK_BYTES as u64).expect("write");
            }
        }
        let order = Order { places: vec![u64::MAX], under_way: BTreeSet::new() };
        Self {
            devices: devices.to_vec(),
            places,
            order: Arc::new(Mutex::new(order)),
            busy: Arc::new((0..all).map(|_| Mutex::new(())).collect()),
        }
    }

    /// A thread that reads and writes; any number of them at once.
    pub fn writer(&self, random: &mut Random) -> Turn {
        let files: Vec<File> = self.devices.iter().map(|path| direct(path)).collect();
        let (places, order, busy) = (self.places, self.order.clone(), self.busy.clone());
        let mut random = random.fork();
        let (mut block, mut read) =
            (Box::new(Aligned([0; BLOCK_BYTES])), Box::new(Aligned([0; BLOCK_BYTES])));
        let mut seen = (0, 0);
        Box::new(move || {
            let all = files.len() as u64 * places;
            let at = |place: u64| {
                (&files[(place / places) as usize], place % places * BLOCK_BYTES as u64)
            };
            if random.below(3) == 0 {
                // Perhaps it is being written right now: what is seen of it counts.
                let (file, offset) = at(random.below(all));
                file.read_exact_at(&mut read.0, offset).expect("read");
                if let Some(stamp) = Stamp::decode(&read.0) {
                    seen = (stamp.place, stamp.number);
                }
            }
            let place = random.below(all);
            let _one = busy[place as usize].lock().expect("no panic");
            let stamp = {
                let mut order = order.lock().expect("no panic");
                let completed = order.completed();
                let number = order.places.len() as u64;
                order.places.push(place);
                order.under_way.insert(number);
                Stamp { number, completed, place, read_place: seen.0, read_number: seen.1 }
            };
            stamp.encode(&mut block.0);
            let (file, offset) = at(place);
            file.write_all_at(&block.0, offset).expect("write");
            order.lock().expect("no panic").under_way.remove(&stamp.number);
            BLOCK_BYTES as u64
        })
    }

    /// How many were issued.
    pub fn issued(&self) -> u64 {
        self.order.lock().expect("no panic").places.len() as u64 - 1
    }

    /// The images of all devices, at one point: the highest number that all of them hold
    /// everything up to, or what contradicts the write order.
    pub fn check(&self, images: &[PathBuf]) -> Result<u64, String> {
        let mut found = Vec::new();
        for image in images {
            let file = File::open(image).map_err(|error| error.to_string())?;
            let mut bytes = vec![0; self.places as usize * BLOCK_BYTES];
            file.read_exact_at(&mut bytes, 0).map_err(|error| error.to_string())?;
            for (at, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
                let stamp = Stamp::decode(block)
                    .ok_or_else(|| format!("{}: block {at} is no stamp", image.display()))?;
                if stamp.place != found.len() as u64 {
                    return Err(format!("{}: block {at} is {stamp:?}", image.display()));
                }
                found.push((stamp, stamp.is_torn(block)));
            }
        }
        let highest = found.iter().map(|(stamp, _)| stamp.completed).max().unwrap_or(0);
        let order = self.order.lock().expect("no panic");
        let mut due = vec![0; found.len()];
        for (number, place) in order.places.iter().enumerate().take(highest as usize + 1).skip(1) {
            due[*place as usize] = number as u64;
        }
        for (stamp, _) in &found {
            let read = &mut due[stamp.read_place as usize];
            *read = (*read).max(stamp.read_number);
        }
        let mut lacking = found.iter().zip(&due).filter(|((stamp, _), due)| stamp.number < **due);
        if let Some(((stamp, _), due)) = lacking.next() {
            let count = lacking.count() + 1;
            return Err(format!(
                "{count} places lack a write that others rest on (up to {highest}): {due} is \
                 missing where {stamp:?} is"
            ));
        }
        // One that was under way may be torn; what is complete may not.
        match found.iter().find(|(stamp, torn)| *torn && stamp.number <= highest) {
            Some((stamp, _)) => Err(format!("torn, and complete long ago: {stamp:?}")),
            None => Ok(highest),
        }
    }
}

fn direct(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
