//! Promotion: the oldest epochs of the journal become part of the replica volume.
//!
//! Idempotent after a crash at any instant: the epochs leave the journal only after the replica is
//! synced and the new base is durable, and until then writing them again gives the same bytes. An
//! interrupted promotion is finished at least as far as it had begun ([`Volume::plan_promotion`]).
//!
//! [`Volume::plan_promotion`]: super::volume::Volume::plan_promotion

use super::keeper::Keeper;
use super::layers::{Layer, next_piece, overlay};
use super::state::StateRecord;
use super::view::FrameReader;
use secondsite_format::ids::Epoch;
use secondsite_format::message::Refusal;
use std::io;

/// Bytes of the volume whose pieces are sorted out at a time.
const WINDOW_BYTES: u64 = 64 << 20;
/// Unpacked frames kept meanwhile, bytes: every epoch of a window has its own at hand.
const READING_BYTES: usize = 64 << 20;

/// Promotes a volume up to `wanted`, as long as `going` says so. Whether anything was promoted.
pub fn promote(keeper: &Keeper, wanted: Epoch, going: &dyn Fn() -> bool) -> Result<bool, Refusal> {
    let (planned, layers) = {
        let volume = keeper.volume();
        volume.check_running()?;
        (volume.plan_promotion(wanted), volume.layers())
    };
    let Some((begun, last)) = planned else { return Ok(false) };
    // Durable before the first write to the replica: from here on it is between two.
    keeper.store_durably(&begun)?;
    keeper.volume().set_record(begun.clone());
    let volume_bytes = last.volume_bytes;
    keeper.grow_replica(volume_bytes)?;
    let base = begun.base.as_ref().map_or(Epoch(0), |base| base.epoch);
    let written = clear(keeper, begun.volume_bytes, volume_bytes, going)
        .and_then(|cleared| Ok(cleared && write(keeper, &layers, base, last.epoch, going)?))
        .map_err(|error| keeper.failed("promoting into", &keeper.replica.path, &error))?;
    if !written {
        return Ok(false); // the next start goes on
    }
    keeper.sync_replica()?;
    let tail = keeper.volume().end_of(last.epoch);
    let base = Some((*last).clone());
    let record = StateRecord { base, volume_bytes, tail, promoting: None, ..begun };
    keeper.store_durably(&record)?;
    // The base is durable and so is the replica: nothing reads these epochs from the journal
    // again, but a view that began before, and that keeps its files.
    let promised = keeper.volume().promoted(record);
    if keeper.replica.is_file {
        keeper.space.give_back(promised);
    }
    drop(layers);
    keeper.let_go();
    Ok(true)
}

/// Makes what a volume has grown by read as zero on a device; a file does so by itself. False if it
/// was told to end.
fn clear(keeper: &Keeper, from: u64, to: u64, going: &dyn Fn() -> bool) -> io::Result<bool> {
    let mut at = from;
    while at < to && !keeper.replica.is_file {
        if !going() {
            return Ok(false);
        }
        let end = (at + WINDOW_BYTES).min(to);
        keeper.replica.file.zero(at, end - at)?;
        at = end;
    }
    Ok(true)
}

/// Writes the newest version of every byte once, in rising order; false if it was told to end.
fn write(
    keeper: &Keeper,
    layers: &[Layer],
    base: Epoch,
    upto: Epoch,
    going: &dyn Fn() -> bool,
) -> io::Result<bool> {
    let replica = &keeper.replica.file;
    let mut reader = FrameReader::new(READING_BYTES);
    let mut at = 0;
    while let Some(start) = next_piece(layers, at, upto)? {
        let end = start.saturating_add(WINDOW_BYTES);
        // What is of the base or older is in the replica already.
        let fresh = overlay(layers, start, end, upto)?.into_iter().filter(|p| p.epoch > base);
        for piece in fresh {
            if !going() {
                return Ok(false);
            }
            reader.piece(layers, &piece, |content| match content {
                Some(content) => replica.write_at(piece.start, content),
                None => replica.zero(piece.start, piece.end - piece.start),
            })?;
        }
        at = end;
    }
    Ok(true)
}
