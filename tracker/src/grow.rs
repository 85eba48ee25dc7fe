//! A volume that grows: from one set of bitmaps to a larger one, while every write goes on being
//! marked, and without looking at the audit, which counts sectors and knows no bitmap.
//!
//! There are two places for sets, 0 and 1; the header's extent says which one counts and for how
//! many sectors. Every step may be the last one of the process, and whoever comes next does the
//! rest again from the beginning ([`grow`]): every step may be repeated.
//!
//! 1. A new set is made in the free place: nobody knows of it yet, and the old one counts. Killed
//!    here, it is made anew.
//! 2. The header says that the volume grows, to which extent. From here on it only goes forward.
//! 3. The cut that stands is given up: what it had taken is live again. Nothing is taken before
//!    the end, so from here on bits are only set.
//! 4. The new part is marked in the new set, beginning with the block that the old end lies in.
//!    So a write to it may go unmarked until step 5 is over: nobody takes these bits before.
//! 5. The programs' bound is raised, then they are given the new set. When [`Sets::switch`]
//!    returns, none runs any more that saw the old bound or the old set: every later mark is in
//!    the new one, every earlier one is in the old one, or in the new one already.
//! 6. Every bit of the old set is set in the new one. Both together held all marks, so now the
//!    new one does. (Bits may be there twice: a block is sent once more, never once less.)
//! 7. One store makes the new extent count; the next takes back that the volume grows; the old
//!    set goes.

use crate::bitmap::Bitmaps;
pub use crate::header::Extent;
use crate::header::Header;
use crate::marks::{BlockRun, Marks, MarksMemory};
use crate::sync::Word;

/// The two places for bitmaps, and what marks in them.
pub trait Sets<W> {
    /// Why they cannot be used.
    type Error;
    /// Makes a set, all zero, in place of what is there: for a volume of this extent, which does
    /// not count yet.
    fn make(&mut self, extent: Extent) -> Result<(), Self::Error>;
    /// Opens a set, with the header that both share.
    fn open(&self, extent: Extent) -> Result<MarksMemory<W>, Self::Error>;
    /// Everything marks in this set from now on. Returns when nothing runs any more that began
    /// before.
    fn switch(&mut self, extent: Extent) -> Result<(), Self::Error>;
    /// Removes the set in this place, if there is one.
    fn remove(&mut self, set: usize) -> Result<(), Self::Error>;
}

/// Ends what an earlier process began, then grows to `sectors` if that is more. The extent that
/// counts then.
pub fn grow<W: Word, S: Sets<W>>(
    sets: &mut S,
    header: &[W],
    block_bytes: u32,
    sectors: u64,
) -> Result<Extent, S::Error> {
    let header = Header::new(header);
    finish(sets, &header, block_bytes)?;
    let now = header.extent();
    if sectors > now.sectors {
        let next = Extent { sectors, set: 1 - now.set };
        sets.make(next)?;
        header.set_growing(Some(next));
        finish(sets, &header, block_bytes)?;
    }
    Ok(header.extent())
}

fn finish<W: Word, S: Sets<W>>(
    sets: &mut S,
    header: &Header<'_, W>,
    block_bytes: u32,
) -> Result<(), S::Error> {
    let now = header.extent();
    if let Some(next) = header.growing().filter(|next| *next != now) {
        let old = Marks::open(now.blocks(block_bytes), sets.open(now)?);
        old.give_up();
        let MarksMemory { live, summary, taken, .. } = sets.open(next)?;
        let new = Bitmaps::new(next.blocks(block_bytes), live, summary, taken);
        let first = (now.sectors << 9) / u64::from(block_bytes);
        new.mark(BlockRun { first, count: new.blocks() - first });
        header.set_bound(next.sectors);
        sets.switch(next)?;
        new.absorb(old.bitmaps());
        header.set_extent(next);
    }
    header.set_growing(None);
    sets.remove(1 - header.extent().set)
}
