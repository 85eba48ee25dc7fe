//! Opening a journal: every frame behind the promoted base is read and checked as if it came from
//! the wire; what is not whole behind the last commit is dropped.
//!
//! A commit frame is written only when the data before it is durable ([`super::journal`]). So
//! bytes that cannot be read with a whole commit of this volume behind them are damage to an
//! acknowledged epoch: the volume stops and nothing is changed. Without one they are an epoch
//! that was never acknowledged.
//!
//! The process that wrote the journal may have died before its last sync, or because one failed.
//! So each segment is settled before it is read: what is found here is told to the source as
//! durable, and the source forgets what it had taken for it.

use super::journal::{FOLDER, FramePlace, HeaderError, Journal, Place, Segment};
use super::journal::{SEGMENT_HEADER_BYTES, VERSION};
use super::merge;
use super::retention::RetentionClock;
use super::run::{self, Run};
use super::segments::{HISTORY, KEPT, Segments};
use super::state::StateRecord;
use super::volume::{CommitStep, DataStep, Verify, Volume};
use secondsite_format::FormatError;
use secondsite_format::extent::Content;
use secondsite_format::frame::{self, Frame, FrameKind, HEADER_BYTES, RawHeader};
use secondsite_format::ids::Epoch;
use secondsite_format::limits;
use secondsite_format::manifest::SignedManifest;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

/// Why a journal cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// Its storage failed.
    #[error("journal: {0}")]
    Io(#[from] io::Error),
    /// A newer Secondsite wrote it.
    #[error(
        "{name} was written by a newer Secondsite ({what} version {found}, this one reads up to \
         {known}): install the newer one again on the target; nothing was changed"
    )]
    Newer {
        /// The segment.
        name: String,
        /// What in it carries the version.
        what: &'static str,
        /// The version found.
        found: u16,
        /// The newest version known here.
        known: u16,
    },
    /// An acknowledged epoch cannot be read.
    #[error(
        "{name} is damaged at offset {offset} ({cause}), and epoch {epoch} was committed behind \
         it: restore the file from the storage below, or unprotect and protect the volume again \
         to begin with a new copy; nothing was changed"
    )]
    Damaged {
        /// The segment.
        name: String,
        /// First byte that cannot be read.
        offset: u64,
        /// What is wrong with it.
        cause: String,
        /// A committed epoch behind it.
        epoch: u64,
    },
}

/// Opens the runs behind `volume`'s base, reads the journal behind them into it, and returns the
/// journal's end. `stamp_s` tells what the retention clock shows once it has gone on from the runs.
pub fn recover(
    segments: &Arc<Segments>,
    volume: &mut Volume,
    verify: Verify,
    clock: &RetentionClock,
) -> Result<Journal, RecoverError> {
    let all = segments;
    let disk = all.disk();
    open_runs(all, volume)?;
    let newest = volume.facts().map(|facts| facts.stamp_s).max();
    clock.resume(newest.unwrap_or(0));
    // A process before this one may have ended, or failed, between writing a commit and making it
    // durable. The source forgets its marks for what is found here, so it must be on the medium.
    disk.sync_names(FOLDER)?;
    let mut numbers: Vec<u64> =
        disk.list(FOLDER)?.iter().filter_map(|name| Segment::number(name)).collect();
    numbers.sort_unstable();
    let mut segments = Vec::new();
    let tail = volume.tail();
    // Those before the tail are read when somebody asks for what is in them.
    for number in numbers.iter().filter(|number| **number >= tail.segment) {
        let segment = all.get(*number);
        segment.file()?.settle()?;
        let whole = segment.check_header(volume.record().volume).map_err(|error| match error {
            HeaderError::Io(error) => RecoverError::Io(error),
            HeaderError::Newer { found } => {
                let name = Segment::name(*number);
                RecoverError::Newer { name, what: "segment", found, known: VERSION }
            }
        })?;
        segments.push((segment, whole));
    }
    let mut scan = Scan { at: tail, committed: tail, volume, verify, clock };
    let stop = scan.run(&segments)?;
    let (name, offset) = (Segment::name(scan.at.segment), scan.at.offset);
    // A promotion that was begun has written parts of its epochs into the replica volume. They were
    // committed then; without them it is the volume at no instant.
    let newest = scan.volume.durable().map(|facts| facts.epoch);
    let begun = scan.volume.record().promoting.map(|promoting| promoting.to);
    if let Some(epoch) = begun.filter(|to| newest < Some(*to)) {
        let cause = match &stop {
            Some(stop) => stop.to_string(),
            None => "the journal ends there".into(),
        };
        return Err(RecoverError::Damaged { name, offset, cause, epoch: epoch.0 });
    }
    match stop {
        // Where a frame of ours is due stands a newer one. An epoch may be acknowledged behind it
        // that cannot be checked here: nothing is dropped.
        Some(Stop::Unread(FormatError::Newer { what, found, known })) => {
            return Err(RecoverError::Newer { name, what, found, known });
        }
        Some(cause) => {
            if let Some(epoch) = scan.commit_behind(&segments)? {
                return Err(RecoverError::Damaged {
                    name,
                    offset,
                    cause: cause.to_string(),
                    epoch,
                });
            }
        }
        None => {}
    }
    scan.volume.drop_staged();
    let committed = scan.committed;
    drop_behind(all, &segments, committed)?;
    // Segments below the tail that no run reads were promoted, or thinned away; a crash kept them
    // from being removed.
    let needed = scan.volume.needed_segments();
    let kept = disk.list(HISTORY)?;
    let kept = kept.iter().filter_map(|name| Segment::number(name)).map(|number| number | KEPT);
    let below = numbers.iter().copied().filter(|number| *number < tail.segment);
    for number in below.chain(kept).filter(|number| !needed.contains(number)) {
        all.remove(number)?;
    }
    let current = segments
        .into_iter()
        .find(|(segment, whole)| segment.number == committed.segment && *whole)
        .map(|(segment, _)| segment);
    let id = scan.volume.record().volume;
    let mut end = committed;
    if current.is_none() && end.offset != SEGMENT_HEADER_BYTES {
        // Somebody took the segment that held the base's commit. Everything of it is in the
        // replica; go on in a fresh one, and say so first, so that the next start looks there.
        let newest = numbers.last().copied().unwrap_or(0).max(end.segment);
        end = Place { segment: newest + 1, offset: SEGMENT_HEADER_BYTES };
        let record = StateRecord { tail: end, ..scan.volume.record().clone() };
        record.store(&**disk)?;
        scan.volume.set_record(record);
    }
    Ok(Journal::new(all.clone(), id, current, end))
}

/// Opens the runs behind the base. What a merge or a promotion left, that a crash interrupted, goes.
fn open_runs(segments: &Segments, volume: &mut Volume) -> Result<(), RecoverError> {
    let disk = segments.disk();
    disk.sync_names(HISTORY)?;
    merge::clean(&**disk)?;
    let base = volume.record().base.as_ref().map_or(Epoch(0), |base| base.epoch);
    let mut found: Vec<(Epoch, Epoch)> =
        disk.list(HISTORY)?.iter().filter_map(|name| run::range(name)).collect();
    // Of those that begin together the longest comes first: a merged one before what it replaced.
    found.sort_by_key(|(from, to)| (*from, std::cmp::Reverse(*to)));
    let mut runs: Vec<Arc<Run>> = Vec::new();
    for (from, to) in found {
        let upto = runs.last().map_or(base, |run| run.to);
        if to <= upto {
            disk.remove(&run::name(from, to))?;
            continue;
        }
        if runs.last().map_or(from > base, |last| from != last.to) {
            let cause = format!("no run holds the epochs from {} to {from}", upto.next());
            return Err(RecoverError::Damaged {
                name: run::name(from, to),
                offset: 0,
                cause,
                epoch: to.0,
            });
        }
        runs.push(Arc::new(Run::open(segments, volume.record().volume, from, to)?));
    }
    let present = |folder: &str, mask: u64| -> io::Result<BTreeSet<u64>> {
        let names = disk.list(folder)?;
        Ok(names.iter().filter_map(|name| Segment::number(name)).map(|n| n | mask).collect())
    };
    let mut present_segments = present(FOLDER, 0)?;
    present_segments.extend(present(HISTORY, KEPT)?);
    for run in &runs {
        if let Some(row) = run.uses.iter().find(|row| !present_segments.contains(&row.number)) {
            let (name, epoch) = (Segment::name(row.number), run.to.0);
            let cause = "the file is missing".into();
            return Err(RecoverError::Damaged { name, offset: 0, cause, epoch });
        }
    }
    volume.set_runs(runs);
    Ok(())
}

/// Takes away what stands behind the last commit. It was never acknowledged, or its commit would
/// have been found.
fn drop_behind(
    all: &Segments,
    segments: &[(Arc<Segment>, bool)],
    committed: Place,
) -> io::Result<()> {
    let mut names_changed = false;
    for (segment, whole) in segments.iter().rev() {
        let behind = segment.number > committed.segment;
        if behind || !whole {
            all.remove(segment.number)?;
            names_changed = true;
        } else if segment.number == committed.segment && segment.file()?.bytes()? > committed.offset
        {
            segment.file()?.truncate(committed.offset)?;
            segment.file()?.sync()?;
        }
    }
    if names_changed { all.disk().sync_names(FOLDER) } else { Ok(()) }
}

/// Why a scan went no further.
#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error(transparent)]
    Unread(#[from] FormatError),
    #[error("{0}")]
    Misplaced(String),
}

struct Scan<'a> {
    at: Place,
    committed: Place,
    volume: &'a mut Volume,
    verify: Verify,
    clock: &'a RetentionClock,
}

impl Scan<'_> {
    /// Replays frames until the end (`None`) or until something is not as it should be.
    fn run(&mut self, segments: &[(Arc<Segment>, bool)]) -> io::Result<Option<Stop>> {
        let stop = |why: String| Ok(Some(Stop::Misplaced(why)));
        for ((segment, whole), due) in segments.iter().zip(self.at.segment..) {
            if segment.number != due {
                return stop(format!("{} is missing", Segment::name(due)));
            }
            if segment.number != self.at.segment {
                self.at = Place { segment: segment.number, offset: SEGMENT_HEADER_BYTES };
            }
            if !whole {
                self.at.offset = 0;
                return stop("its header is not whole".into());
            }
            let bytes = segment.file()?.bytes()?;
            if bytes < self.at.offset {
                return stop("it is cut short".into());
            }
            while self.at.offset < bytes {
                if let Err(stop) = self.frame(segment, bytes)? {
                    return Ok(Some(stop));
                }
            }
        }
        Ok(None)
    }

    /// Replays the frame at `self.at`, whatever its body claims to be.
    fn frame(&mut self, segment: &Arc<Segment>, bytes: u64) -> io::Result<Result<(), Stop>> {
        let offset = self.at.offset;
        let frame = match read_frame(segment, offset, bytes)? {
            Ok(frame) => frame,
            Err(error) => return Ok(Err(error.into())),
        };
        let total_bytes = frame.total_bytes();
        let stop = |why: String| Ok(Err(Stop::Misplaced(why)));
        match frame.header.kind {
            FrameKind::Data => {
                // How large the volume is says the commit behind it, which is checked against it.
                let content = match Content::decode(&frame.body, limits::VOLUME_BYTES_MAX) {
                    Ok(content) => content,
                    Err(error) => return Ok(Err(error.into())),
                };
                let digest = content.digest();
                match self.volume.check_data(&frame.header, &content, &digest) {
                    Ok(DataStep::Append { drop_staged: false }) => {}
                    Ok(_) => return stop("a frame of another cut, or one twice".into()),
                    Err(refusal) => return stop(refusal.message),
                }
                let place =
                    FramePlace { segment: segment.clone(), offset, bytes: total_bytes as u32 };
                self.volume.stage(&frame.header, &content, digest, place);
                self.at.offset += total_bytes;
            }
            FrameKind::Commit => {
                let signed = match SignedManifest::decode(&frame.body) {
                    Ok(signed) => signed,
                    Err(error) => return Ok(Err(error.into())),
                };
                match self.volume.check_commit(&frame.header, &signed, None, self.verify) {
                    Ok(CommitStep::Append { drop_staged: false }) => {}
                    Ok(_) => return stop("a commit without its frames, or one twice".into()),
                    Err(refusal) => return stop(refusal.message),
                }
                self.at.offset += total_bytes;
                self.volume.commit(&signed, total_bytes, self.at, self.clock.now_s());
                self.committed = self.at;
            }
            kind => return stop(format!("a {kind:?} frame does not belong there")),
        }
        Ok(Ok(()))
    }

    /// Looks behind `self.at` for a whole commit of an epoch of this volume that is not durable
    /// as far as the scan came. The journal holds blocks as they were on the source, so anything
    /// may stand there: only a manifest that names this volume and whose signature is good counts.
    fn commit_behind(&self, segments: &[(Arc<Segment>, bool)]) -> io::Result<Option<u64>> {
        /// Bytes looked at in one go.
        const WINDOW_BYTES: usize = 1 << 20;
        let magic = frame::MAGIC.to_le_bytes();
        let mut window = vec![0; WINDOW_BYTES + magic.len() - 1];
        for (segment, _) in segments.iter().filter(|(s, _)| s.number >= self.at.segment) {
            let bytes = segment.file()?.bytes()?;
            let mut from = if segment.number == self.at.segment { self.at.offset } else { 0 };
            while from < bytes {
                let count = window.len().min((bytes - from) as usize);
                segment.file()?.read_at(from, &mut window[..count])?;
                let places = window[..count].windows(magic.len()).enumerate();
                for (i, _) in places.filter(|(_, found)| *found == magic) {
                    if let Some(epoch) = self.is_commit(segment, from + i as u64, bytes)? {
                        return Ok(Some(epoch));
                    }
                }
                from += WINDOW_BYTES as u64;
            }
        }
        Ok(None)
    }

    fn is_commit(&self, segment: &Segment, offset: u64, bytes: u64) -> io::Result<Option<u64>> {
        let Ok(frame) = read_frame(segment, offset, bytes)? else { return Ok(None) };
        if frame.header.kind != FrameKind::Commit {
            return Ok(None);
        }
        let Ok(signed) = SignedManifest::decode(&frame.body) else { return Ok(None) };
        let (manifest, record) = (&signed.manifest, self.volume.record());
        let durable = self.volume.durable().map_or(0, |facts| facts.epoch.0);
        let ours = (manifest.server, manifest.volume, manifest.generation)
            == (record.server, record.volume, record.generation)
            && manifest.epoch.0 > durable
            && (self.verify)(&signed.public_key, &signed.signed_bytes, &signed.signature);
        Ok(ours.then_some(manifest.epoch.0))
    }
}

/// The frame at `offset` of a segment of `bytes`; the inner error says what is wrong with it.
fn read_frame(
    segment: &Segment,
    offset: u64,
    bytes: u64,
) -> io::Result<Result<Frame, FormatError>> {
    let cut_short =
        |need: u64| Ok(Err(FormatError::Truncated { what: "frame", have: bytes - offset, need }));
    if bytes - offset < HEADER_BYTES as u64 {
        return cut_short(HEADER_BYTES as u64);
    }
    let mut header = [0; HEADER_BYTES];
    segment.file()?.read_at(offset, &mut header)?;
    let raw = match RawHeader::parse(&header) {
        Ok(raw) => raw,
        Err(error) => return Ok(Err(error)),
    };
    let total_bytes = (HEADER_BYTES + raw.body_bytes()) as u64;
    if bytes - offset < total_bytes {
        return cut_short(total_bytes);
    }
    let mut body = vec![0; raw.body_bytes()];
    segment.file()?.read_at(offset + HEADER_BYTES as u64, &mut body)?;
    Ok(raw.with_body(body))
}
