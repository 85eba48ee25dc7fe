//! A filter in front of a disk: its gate, the copies that it makes, and the writes that wait.
//!
//! The filter may be killed at any moment, and is there again at once: the writes that it had
//! submitted end, and all that were not acknowledged are issued once more.

use crate::world::{BLOCK, DiskState, Rng, State, World, Write};
use secondsite::source::seams::Cutter;
use secondsite_format::ids::VolumeId;
use secondsite_tracker::filter::gate::{Admission, Gate, Preserve};
use secondsite_tracker::filter::shared::{Form, Group, Shared};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

const DEPTH: usize = 4;

/// See the module.
pub struct Filtered {
    form: Form,
    words: Arc<[AtomicU64]>,
    /// The filter's side.
    shared: Arc<Shared>,
    gate: Gate,
    copies: Vec<Preserve>,
}

impl Filtered {
    /// In front of a disk of so many bytes.
    pub fn new(bytes: usize, group: &Group, memory_slots: u32) -> Self {
        let form = Form {
            volume_bytes: bytes as u64,
            block_bytes: BLOCK as u32,
            memory_slots,
            spill_slots: 0,
            identity: 1,
        };
        let words = Shared::heap(&form);
        let shared = Arc::new(Shared::in_memory(form, group, false, &words));
        let gate = Gate::new(shared.clone(), 1, DEPTH);
        Self { form, words, shared, gate, copies: Vec::new() }
    }

    /// After a reboot: nothing is left of what was shared.
    pub fn anew(&self, group: &Group) -> Self {
        Self::new(self.form.volume_bytes as usize, group, self.form.memory_slots)
    }

    /// As the agent opens it.
    pub fn open(&self, group: &Group) -> Arc<Shared> {
        Arc::new(Shared::in_memory(self.form, group, true, &self.words))
    }

    /// Something happens: a write comes, is let through, lands or completes; a copy ends; the
    /// filter is killed.
    pub fn moment(disk: &mut DiskState, rng: &mut Rng, stamp: &mut u64) {
        let bytes = disk.bytes();
        let Some(filter) = &mut disk.filter else { return };
        match rng.below(12) {
            0..=3 if disk.writes.len() < DEPTH => {
                let mut write = Write::random(bytes, rng, stamp);
                let taken = |tag: u16| disk.writes.iter().any(|write| write.tag == tag);
                write.tag = (0..DEPTH as u16).find(|tag| !taken(*tag)).expect("a free one");
                filter.admit(&mut write);
                disk.writes.push(write);
            }
            4..=6 => {
                if let Some(write) = disk.writes.iter_mut().find(|w| !w.landed && !w.waits) {
                    write.landed = true;
                    write.land(&mut disk.data);
                }
            }
            7..=8 => {
                if let Some(i) = disk.writes.iter().position(|write| write.landed) {
                    let write = disk.writes.remove(i);
                    filter.gate.completed(0, write.tag);
                    filter.retry(&mut disk.writes);
                }
            }
            9..=10 => {
                if let Some(copy) = filter.copies.pop() {
                    filter.copy(&copy, &disk.data, !rng.chance(1));
                    filter.retry(&mut disk.writes);
                }
            }
            _ if rng.chance(5) => {
                for write in disk.writes.iter().filter(|write| !write.landed && !write.waits) {
                    write.land(&mut disk.data);
                }
                filter.copies.clear();
                filter.gate = Gate::new(filter.shared.clone(), 1, DEPTH);
                filter.gate.take_over();
                for write in &mut disk.writes {
                    write.landed = false;
                    filter.admit(write);
                }
            }
            _ => {}
        }
    }

    fn admit(&mut self, write: &mut Write) {
        let block = BLOCK as u64;
        let first = write.run.first * block;
        let end = (first + write.run.count * block).min(self.form.volume_bytes);
        write.waits =
            self.gate.admit(0, write.tag, first..end, &mut self.copies) == Admission::Wait;
    }

    fn retry(&mut self, writes: &mut [Write]) {
        writes.iter_mut().filter(|write| write.waits).for_each(|write| self.admit(write));
    }

    fn copy(&self, copy: &Preserve, data: &[u8], ok: bool) {
        let from = copy.offset as usize..copy.offset as usize + copy.bytes as usize;
        for (slot, block) in (copy.slot..).zip(data[from].chunks(BLOCK)) {
            // SAFETY: a slot has a block's bytes, and nobody reads it before it is published.
            unsafe { self.shared.slot(slot).copy_from(block.as_ptr(), block.len()) };
        }
        self.gate.preserved(copy, ok);
    }

    /// All writes complete.
    pub fn settle(disk: &mut DiskState) {
        while !disk.writes.is_empty() {
            let Some(filter) = &mut disk.filter else { return };
            for write in disk.writes.iter_mut().filter(|write| !write.waits && !write.landed) {
                write.landed = true;
                write.land(&mut disk.data);
            }
            while let Some(copy) = filter.copies.pop() {
                filter.copy(&copy, &disk.data, true);
            }
            let done = disk.writes.extract_if(.., |write| write.landed);
            done.for_each(|write| {
                filter.gate.completed(0, write.tag);
            });
            filter.retry(&mut disk.writes);
        }
    }
}

/// Cuts the disks behind the filter, and notes what they hold then.
pub struct MemoryCutter(pub Arc<World>);

impl Cutter for MemoryCutter {
    fn cut(&mut self, volumes: &[VolumeId]) -> Result<u64, String> {
        self.0.moment();
        let flip = {
            let mut state = self.0.state();
            let State { disks, group, .. } = &mut *state;
            let members: Vec<&mut DiskState> = disks
                .iter_mut()
                .enumerate()
                .filter(|(index, _)| volumes.contains(&crate::remote::volume_id(*index)))
                .map(|(_, disk)| disk)
                .collect();
            let gates = members.iter().map(|disk| &disk.filter.as_ref().expect("filtered").gate);
            let flip = Gate::cut(group, gates).map_err(|error| error.to_string())?;
            let mut cut_id = None;
            for disk in members {
                // Those that were let through are in; they have yet to land.
                let mut data = disk.data.clone();
                disk.writes
                    .iter()
                    .filter(|w| !w.waits && !w.landed)
                    .for_each(|w| w.land(&mut data));
                disk.flipped = Some(Arc::new(data));
                cut_id = Some(disk.marks.cut().cut_id);
            }
            if let Some(cut_id) = cut_id {
                let instant = state.instant();
                state.instants.insert(cut_id, instant);
            }
            flip
        };
        self.0.moment();
        Ok(flip)
    }
}
