//! What the worker threads do: find zeros, digest, compress. One shared pool for all volumes.
//!
//! A job owns its buffer until the frame made of it was sent, so the buffers bound all memory on
//! the way. The answers' channel has room for every job a volume may have out, so that a worker
//! never waits for a volume. Without threads the work is done where it is submitted (simulation).

use crate::source::buffers::Buffer;
use crate::source::runs::Shape;
use crate::source::seams::Batch;
use crossbeam::channel::{Receiver, Sender, bounded};
use secondsite_format::extent::{Content, Extent, ExtentKind};
use secondsite_tracker::marks::BlockRun;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Most batches of one volume that are being read, digested or waiting to be sent.
pub const JOBS_MAX: usize = 12;

/// What a frame is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Part of an epoch: its digest goes into the manifest.
    Epoch,
    /// Part of a first copy, which no manifest covers.
    FirstCopy {
        /// Zeros need not travel: the replica volume reads as zero.
        skip_zeros: bool,
    },
}

/// A batch that was read and is to become a frame.
pub struct Job {
    /// What was read.
    pub batch: Batch,
    /// The volume's shape.
    pub shape: Arc<Shape>,
    /// What it is made for.
    pub purpose: Purpose,
    /// Where the result goes.
    pub reply: Sender<Encoded>,
}

/// A frame's body, with what the session needs to know about it.
pub struct Encoded {
    /// The batch's tag.
    pub tag: u64,
    /// Body and content digest (zero in a first copy); none if nothing is to be sent.
    pub body: Option<(Vec<u8>, [u8; 32])>,
    /// Offset of the first extent, bytes.
    pub offset: u64,
    /// The blocks that it stands for.
    pub runs: Vec<BlockRun>,
    /// What could not be read.
    pub unreadable: Vec<(u64, u64)>,
    /// Held until the frame was sent.
    pub buffer: Buffer,
}

impl Job {
    fn run(self) {
        let Self { batch, shape, purpose, reply } = self;
        let runs = batch.pieces.iter().map(|p| shape.run(p.offset, p.bytes as u64)).collect();
        let skip_zeros = purpose == Purpose::FirstCopy { skip_zeros: true };
        let content = content(&batch, shape.block_bytes as usize, skip_zeros);
        let digest = || match purpose {
            Purpose::Epoch => content.digest(),
            // No manifest covers it.
            Purpose::FirstCopy { .. } => [0; 32],
        };
        let body = (!content.extents().is_empty()).then(|| (content.encode(), digest()));
        let offset = content.extents().first().map_or(0, |extent| extent.offset);
        let Batch { tag, unreadable, buffer, .. } = batch;
        // A volume that has gone away no longer wants it.
        let _ = reply.send(Encoded { tag, body, offset, runs, unreadable, buffer });
    }
}

/// The extents of a batch: zero blocks become zero extents, neighbours of a kind are merged,
/// unreadable blocks are left out.
fn content(batch: &Batch, block_bytes: usize, skip_zeros: bool) -> Content {
    let mut extents: Vec<Extent> = Vec::with_capacity(batch.pieces.len());
    let mut payload = Vec::with_capacity(batch.pieces.iter().map(|piece| piece.bytes).sum());
    for piece in &batch.pieces {
        let bytes = &batch.buffer.bytes()[piece.at..piece.at + piece.bytes];
        for (i, block) in bytes.chunks(block_bytes).enumerate() {
            let offset = piece.offset + (i * block_bytes) as u64;
            if batch.unreadable.iter().any(|(bad, len)| (*bad..bad + len).contains(&offset)) {
                continue;
            }
            let kind = if is_zero(block) { ExtentKind::Zero } else { ExtentKind::Data };
            if kind == ExtentKind::Data {
                payload.extend_from_slice(block);
            } else if skip_zeros {
                continue;
            }
            let len = block.len() as u64;
            match extents.last_mut() {
                Some(last) if last.kind == kind && last.end() == offset => last.bytes += len,
                _ => extents.push(Extent { offset, bytes: len, kind }),
            }
        }
    }
    Content::new(extents, payload).expect("a packed batch is a valid frame")
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (head, words, tail) = bytes
        .as_chunks::<64>()
        .0
        .split_first()
        .map_or((None, [].as_slice(), bytes), |(first, rest)| {
            (Some(first), rest, &bytes[(1 + rest.len()) * 64..])
        });
    // The first word decides for nearly every block that has data.
    head.is_none_or(|first| *first == [0; 64])
        && words.iter().all(|word| *word == [0; 64])
        && tail.iter().all(|byte| *byte == 0)
}

/// The pool of worker threads.
pub struct Workers {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts threads; with none, work is done by whoever submits it.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        if threads == 0 {
            return Ok(Self { jobs: None, threads: Vec::new() });
        }
        let (jobs, queue) = bounded::<Job>(threads * 2);
        let spawn = |queue: Receiver<Job>| {
            std::thread::Builder::new()
                .name("digest".into())
                .spawn(move || queue.into_iter().for_each(Job::run))
        };
        let threads = (0..threads).map(|_| spawn(queue.clone())).collect::<Result<_, _>>()?;
        Ok(Self { jobs: Some(jobs), threads })
    }

    /// Hands a job over; waits while all workers are busy.
    pub fn submit(&self, job: Job) {
        match &self.jobs {
            Some(jobs) => jobs.send(job).expect("workers live as long as the pool"),
            None => job.run(),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
