//! Space of the store: checked before it is taken.
//!
//! What promotion of everything in the journals may still write is promised to it, so that a full
//! store can always promote its way out; besides, `reserve_bytes` are never used. Shared by all
//! volumes of one store.

use super::disk::Disk;
use super::volume::refuse;
use secondsite_format::message::{Refusal, RefusalCode};
use std::sync::Mutex;

/// Who owns what is left.
pub struct Space {
    reserve_bytes: u64,
    promised_bytes: Mutex<u64>,
}

impl Space {
    /// `reserve_bytes` are never used.
    pub fn new(reserve_bytes: u64) -> Self {
        Self { reserve_bytes, promised_bytes: Mutex::new(0) }
    }

    /// Asks for `now_bytes` that are written at once, and promises `later_bytes` to promotion.
    pub fn take(&self, disk: &dyn Disk, now_bytes: u64, later_bytes: u64) -> Result<(), Refusal> {
        let free_bytes = disk.free_bytes().map_err(|error| {
            let message = format!("free space of {}: {error}", disk.path("").display());
            refuse(RefusalCode::Storage, message)
        })?;
        let mut promised = self.promised();
        let needed = self.reserve_bytes + *promised + now_bytes + later_bytes;
        if free_bytes < needed {
            let message = format!(
                "no space left at {}: {free_bytes} bytes are free, {needed} are needed ({} to \
                 promote what is in the journals, {} in reserve); make room there, replication \
                 then goes on by itself",
                disk.path("").display(),
                *promised + later_bytes,
                self.reserve_bytes
            );
            return Err(refuse(RefusalCode::NoSpace, message));
        }
        *promised += later_bytes;
        Ok(())
    }

    /// Promises without asking: it is in the journal already.
    pub fn promise(&self, bytes: u64) {
        *self.promised() += bytes;
    }

    /// The reserve and what is promised, bytes.
    pub fn state(&self) -> (u64, u64) {
        (self.reserve_bytes, *self.promised())
    }

    /// A promise was kept, or is void.
    pub fn give_back(&self, bytes: u64) {
        *self.promised() -= bytes;
    }

    fn promised(&self) -> std::sync::MutexGuard<'_, u64> {
        self.promised_bytes.lock().expect("nothing panics while it holds the promises")
    }
}
