//! Reading with depth, digesting beside it, handing results over in this thread: the one loop that
//! passes, first copy and compares share.
//!
//! Buffers are taken one at a time and only while something of ours can finish without one, so
//! volumes that share the pool never wait for each other in a circle. On an error everything in
//! flight is waited for and dropped before the loop returns.

use crate::source::buffers::{Buffer, Pool};
use crate::source::pipeline::{Encoded, JOBS_MAX, Job, Purpose, Workers};
use crate::source::runs::{Packer, Shape};
use crate::source::seams::{Batch, Disk};
use crate::source::shipper::{Commons, StepError};
use crate::source::volume::Volume;
use crossbeam::channel::{Receiver, bounded};
use secondsite_tracker::marks::BlockRun;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Batches read ahead by one volume.
const READ_AHEAD: usize = 6;
/// How long to wait for a buffer before looking whether to stop.
const BUFFER_PATIENCE: Duration = Duration::from_millis(200);

const _: () = assert!(READ_AHEAD <= JOBS_MAX);

/// A buffer, when `may_wait` even if that takes a while.
fn buffer(pool: &Pool, volume: &Volume, may_wait: bool) -> Result<Option<Buffer>, StepError> {
    loop {
        if volume.stopping() {
            return Err(StepError::Stopping);
        }
        if !may_wait {
            return Ok(pool.try_take());
        }
        if let Some(buffer) = pool.take(BUFFER_PATIENCE) {
            return Ok(Some(buffer));
        }
    }
}

/// Queues batches until the read-ahead is full.
fn fill(
    packer: &mut Packer<'_>,
    disk: &mut dyn Disk,
    pool: &Pool,
    volume: &Volume,
    elsewhere: usize,
    tag: &mut u64,
) -> Result<(), StepError> {
    while !packer.is_empty()
        && disk.outstanding() < READ_AHEAD
        && disk.outstanding() + elsewhere < JOBS_MAX
    {
        let may_wait = disk.outstanding() + elsewhere == 0;
        let Some(buffer) = buffer(pool, volume, may_wait)? else { break };
        let mut pieces = Vec::new();
        packer.fill(&mut pieces);
        disk.submit(Batch { tag: *tag, pieces, buffer, unreadable: Vec::new() })?;
        *tag += 1;
    }
    Ok(())
}

/// Reads runs and hands each batch over in order of offset.
pub fn read_in_order(
    disk: &mut dyn Disk,
    pool: &Pool,
    volume: &Volume,
    runs: &[BlockRun],
    mut sink: impl FnMut(&Batch),
) -> Result<(), StepError> {
    let mut packer = Packer::new(&volume.shape, runs);
    let mut early: BTreeMap<u64, Batch> = BTreeMap::new();
    let (mut tag, mut due) = (0, 0_u64);
    let result = (|| {
        loop {
            fill(&mut packer, disk, pool, volume, early.len(), &mut tag)?;
            if disk.outstanding() == 0 {
                return Ok(());
            }
            let batch = disk.wait()?;
            early.insert(batch.tag, batch);
            while early.first_key_value().is_some_and(|(tag, _)| *tag == due) {
                due += 1;
                early.pop_first().iter().for_each(|(_, batch)| sink(batch));
            }
        }
    })();
    disk.drain();
    result
}

/// Reads runs, makes frames' bodies of them, and hands these over as they come. `read` sees each
/// batch right after it was read, and may leave pieces out of it.
pub fn encode(
    disk: &mut dyn Disk,
    commons: &Commons,
    volume: &Volume,
    runs: &[BlockRun],
    purpose: Purpose,
    mut read: impl FnMut(&mut Batch),
    mut sink: impl FnMut(Encoded) -> Result<(), StepError>,
) -> Result<(), StepError> {
    let (reply, encoded) = bounded(JOBS_MAX);
    let mut packer = Packer::new(&volume.shape, runs);
    let (mut tag, mut jobs) = (0, 0);
    let result = (|| {
        loop {
            fill(&mut packer, disk, &commons.memory.bulk, volume, jobs, &mut tag)?;
            if disk.outstanding() == 0 && jobs == 0 {
                return Ok(());
            }
            if disk.outstanding() > 0 {
                let mut batch = disk.wait()?;
                read(&mut batch);
                let shape: Arc<Shape> = volume.shape.clone();
                commons.workers.submit(Job { batch, shape, purpose, reply: reply.clone() });
                jobs += 1;
            } else {
                sink(received(&encoded))?;
                jobs -= 1;
            }
            while let Ok(done) = encoded.try_recv() {
                sink(done)?;
                jobs -= 1;
            }
        }
    })();
    disk.drain();
    result
}

/// Makes bodies of batches that were read before, in their order.
pub fn encode_batches(
    workers: &Workers,
    volume: &Volume,
    batches: Vec<Batch>,
    mut sink: impl FnMut(Encoded) -> Result<(), StepError>,
) -> Result<(), StepError> {
    // Room for all of them: none may wait for another.
    let (reply, encoded) = bounded(batches.len().max(1));
    let count = batches.len();
    for batch in batches {
        let shape = volume.shape.clone();
        workers.submit(Job { batch, shape, purpose: Purpose::Epoch, reply: reply.clone() });
    }
    (0..count).try_for_each(|_| sink(received(&encoded)))
}

fn received(encoded: &Receiver<Encoded>) -> Encoded {
    encoded.recv().expect("workers answer every job, and a sender is held here")
}
