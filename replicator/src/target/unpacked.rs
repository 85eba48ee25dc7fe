//! Frames that small reads have unpacked, in a file without a name: what a client reads here and
//! there must not cost a whole frame each time, nor memory as large as the volume. The kernel keeps
//! of the file what it has room for.
//!
//! Invariants: a place is written once, before anybody is told of it, and never again, so that a
//! reader needs no lock while it reads; when all are taken no more frames come in. The file goes
//! with the process. What cannot be written there is read as before.

use super::index::FrameSpot;
use secondsite_format::limits::FRAME_PAYLOAD_BYTES_MAX;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// See the module.
pub struct Unpacked {
    file: File,
    places_max: u32,
    /// Place and payload bytes.
    places: RwLock<HashMap<FrameSpot, (u32, u32)>>,
    taken: AtomicU32,
}

impl Unpacked {
    /// A file in `folder` that takes at most `bytes_max`.
    pub fn new(folder: &Path, bytes_max: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600);
        let places = bytes_max / FRAME_PAYLOAD_BYTES_MAX as u64;
        Ok(Self {
            file: options.open(folder)?,
            places_max: u32::try_from(places).unwrap_or(u32::MAX),
            places: RwLock::default(),
            taken: AtomicU32::new(0),
        })
    }

    /// Fills `part` from byte `at` of the payload of a frame, if it is here.
    pub fn read(&self, frame: FrameSpot, at: u32, part: &mut [u8]) -> io::Result<bool> {
        let places = self.places.read().expect("nothing panics while it holds the places");
        let Some((place, bytes)) = places.get(&frame).copied() else { return Ok(false) };
        drop(places);
        if at as usize + part.len() > bytes as usize {
            return Ok(false); // who unpacks it says what is wrong
        }
        let start = u64::from(place) * FRAME_PAYLOAD_BYTES_MAX as u64;
        self.file.read_exact_at(part, start + u64::from(at))?;
        Ok(true)
    }

    /// Gives a frame a place, if there is one.
    pub fn keep(&self, frame: FrameSpot, payload: &[u8]) {
        // Relaxed: a place is nobody else's until it is among the places.
        let next = |taken: u32| (taken < self.places_max).then(|| taken + 1);
        let place = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        let Ok(place) = place else { return };
        let start = u64::from(place) * FRAME_PAYLOAD_BYTES_MAX as u64;
        if let Err(error) = self.file.write_all_at(payload, start) {
            // Such as a full store: what is here stays, and nothing comes in any more.
            tracing::debug!(%error, "keeping unpacked frames");
            self.taken.store(self.places_max, Ordering::Relaxed);
            return;
        }
        let mut places = self.places.write().expect("nothing panics while it holds the places");
        places.insert(frame, (place, payload.len() as u32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_get_places_until_all_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let unpacked = Unpacked::new(folder.path(), 2 << 20).unwrap();
        let spot = |offset| FrameSpot { segment: 1, offset, bytes: 10 };
        let mut part = [0; 2];
        assert!(!unpacked.read(spot(0), 0, &mut part).unwrap());
        for offset in 0..3 {
            unpacked.keep(spot(offset), &[offset as u8; 8]);
        }
        for offset in 0..3 {
            assert_eq!(unpacked.read(spot(offset), 6, &mut part).unwrap(), offset < 2);
            assert_eq!(part, [offset.min(1) as u8; 2]);
        }
        assert!(!unpacked.read(spot(1), 7, &mut part).unwrap(), "beyond its end");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it has a name");
    }
}
