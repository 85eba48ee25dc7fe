//! One queue of a filter: a thread, a ring, and a buffer for each request that can be under way.
//!
//! A request arrives as the completion of a fetch, goes down as one operation on the backing device
//! and is answered together with the next fetch. Writes pass the gate first; one that has to wait
//! holds nothing but its tag. After the start nothing is opened, allocated or logged here.
//!
//! The ring holds the character device: as long as one of its operations is on its way, nobody
//! else can take the device over.

use super::abi::{self, IoCommand, IoDescriptor};
use super::backing::{Backing, SECTOR_SHIFT};
use super::discard::Discards;
use super::log::Log;
use super::memory::Mapping;
use super::preserve::{COPIES, Copies};
use crate::filter::gate::{Admission, COPIES_MAX, Gate, Preserve, Wake};
use io_uring::{IoUring, opcode, squeue, types};
use nix::sys::eventfd::EventFd;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// Places in the table of registered files.
const CHARACTER: types::Fixed = types::Fixed(0);
const BACKING: types::Fixed = types::Fixed(1);
const EVENT: types::Fixed = types::Fixed(2);
const RESERVE: types::Fixed = types::Fixed(3);

/// What a completion belongs to, in the upper half of its user data.
const FETCH: u64 = 0;
const IO: u64 = 1;
const COPY: u64 = 2;
const WOKEN: u64 = 3;

/// Completions that are taken at a time.
const BATCH: usize = 64;
/// What a queue is made of.
pub(super) struct Parts {
    pub qid: u16,
    pub depth: u16,
    pub buffer_bytes: u32,
    /// None: the backing device cannot be had, and every request fails.
    pub backing: Option<Arc<Backing>>,
    pub reserve: Option<Arc<Backing>>,
    pub gate: Arc<Gate>,
    pub log: Option<Arc<Log>>,
    /// One a queue of this device: written to wake it.
    pub events: Arc<[EventFd]>,
}

#[derive(Clone, Copy, Default)]
struct Request {
    op: u32,
    flags: u32,
    offset: u64,
    bytes: u64,
    /// Bytes that are done, of a read or a write.
    done: u32,
    /// Punching was refused: zeroes are written.
    plain_zeroes: bool,
}

/// A queue; its thread alone uses it.
pub(super) struct Queue {
    parts: Parts,
    lane: usize,
    ring: IoUring,
    buffers: Mapping,
    descriptors: Option<Mapping>,
    requests: Vec<Request>,
    waiting: VecDeque<u16>,
    retry: bool,
    out: Vec<Preserve>,
    copies: Copies,
    discards: Option<Discards>,
    event: Box<u64>,
    fetching: u16,
}

impl Queue {
    /// Everything that takes time: memory, ring, threads. To be made by the thread that runs it.
    pub fn prepare(parts: Parts) -> io::Result<Self> {
        let depth = usize::from(parts.depth);
        let entries = (2 * depth + COPIES).next_power_of_two() as u32;
        // Not with deferred task work: what arrives while a killed server goes down would lie in a
        // list that the kernel looks at only after it has cancelled what waits for that list.
        let ring = IoUring::new(entries)?;
        let buffers = Mapping::anonymous(depth * parts.buffer_bytes as usize)?;
        let discards = match &parts.backing {
            Some(backing) => {
                let (events, lane) = (parts.events.clone(), usize::from(parts.qid));
                Some(Discards::start(backing.fd(), parts.depth, move || ring_bell(&events[lane]))?)
            }
            None => None,
        };
        Ok(Self {
            lane: parts.qid.into(),
            ring,
            buffers,
            descriptors: None,
            requests: vec![Request::default(); depth],
            waiting: VecDeque::with_capacity(depth),
            retry: false,
            out: Vec::with_capacity(COPIES_MAX),
            copies: Copies::new(
                // The gate has no more under way, over all queues.
                COPIES_MAX,
                BACKING,
                RESERVE,
                parts.reserve.is_some(),
            )?,
            discards,
            event: Box::new(0),
            fetching: 0,
            parts,
        })
    }

    /// Asks the kernel for requests. The mapping comes last: a server that dies before it leaves
    /// nothing that would keep the next one from taking the device over.
    pub fn fetch(&mut self, character: &File) -> io::Result<()> {
        let mut files = vec![character.as_raw_fd(); 4];
        if let Some(backing) = &self.parts.backing {
            files[BACKING.0 as usize] = backing.fd();
        }
        files[EVENT.0 as usize] = self.parts.events[self.lane].as_fd().as_raw_fd();
        if let Some(reserve) = &self.parts.reserve {
            files[RESERVE.0 as usize] = reserve.fd();
        }
        self.ring.submitter().register_files(&files)?;
        for tag in 0..self.parts.depth {
            self.push(self.command(abi::FETCH_REQ, tag, 0), FETCH, tag.into());
        }
        self.fetching = self.parts.depth;
        self.listen();
        self.ring.submit()?;
        // SAFETY: asks the kernel for a number; there is nothing it could harm.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = usize::from(self.parts.depth) * size_of::<IoDescriptor>();
        let offset = self.lane * abi::QUEUE_DEPTH_MAX * size_of::<IoDescriptor>();
        let mapping = Mapping::of_device(character, offset as u64, bytes.next_multiple_of(page))?;
        self.descriptors = Some(mapping);
        Ok(())
    }

    /// Serves until the device is stopped.
    pub fn run(&mut self) -> io::Result<()> {
        let mut done = [(0u64, 0i32); BATCH];
        while self.fetching > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {}
                Err(error) => return Err(error),
            }
            loop {
                let mut count = 0;
                for entry in self.ring.completion().take(BATCH) {
                    done[count] = (entry.user_data(), entry.result());
                    count += 1;
                }
                for (data, result) in &done[..count] {
                    let index = *data as u32;
                    match data >> 32 {
                        FETCH => self.fetched(index as u16, *result)?,
                        IO => self.went_down(index as u16, *result),
                        COPY => self.copied(index as usize, *result),
                        _ => self.woken(),
                    }
                }
                if count < BATCH {
                    break;
                }
            }
            self.settle();
        }
        Ok(())
    }

    /// Tries again what waits, as often as that wakes something of this queue.
    fn settle(&mut self) {
        while std::mem::take(&mut self.retry) {
            for _ in 0..self.waiting.len() {
                if let Some(tag) = self.waiting.pop_front() {
                    self.admit(tag);
                }
            }
        }
        while let Some((index, entry)) = self.copies.begin(&self.parts.gate) {
            self.push(entry, COPY, index as u32);
        }
    }

    fn fetched(&mut self, tag: u16, result: i32) -> io::Result<()> {
        if result != 0 {
            self.fetching -= 1;
            return match result {
                abi::RES_ABORT => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
        }
        let descriptors = self.descriptors.as_ref().expect("mapped before it runs");
        // SAFETY: the descriptor of a tag of this queue lies in the mapping; the kernel has written
        // it before the fetch came back and leaves it alone until the request is answered.
        let descriptor =
            unsafe { descriptors.start().cast::<IoDescriptor>().add(tag.into()).read_volatile() };
        self.requests[usize::from(tag)] = Request {
            op: descriptor.op_flags & 0xff,
            flags: descriptor.op_flags,
            offset: descriptor.start_sector << SECTOR_SHIFT,
            bytes: u64::from(descriptor.nr_sectors) << SECTOR_SHIFT,
            done: 0,
            plain_zeroes: false,
        };
        if self.parts.backing.is_none() {
            self.answer(tag, -libc::EIO);
            return Ok(());
        }
        match descriptor.op_flags & 0xff {
            abi::OP_WRITE | abi::OP_DISCARD | abi::OP_WRITE_ZEROES => self.admit(tag),
            abi::OP_READ | abi::OP_FLUSH => self.submit(tag),
            _ => self.answer(tag, -libc::EOPNOTSUPP),
        }
        Ok(())
    }

    /// A write goes down, or waits until it is woken.
    fn admit(&mut self, tag: u16) {
        let request = self.requests[usize::from(tag)];
        let range = request.offset..request.offset + request.bytes;
        // First: who has passed here waits in the gate only for what has passed as well.
        if self.parts.log.as_ref().is_some_and(|log| !log.enter(self.lane, tag, &range)) {
            return self.waiting.push_back(tag);
        }
        self.out.clear();
        match self.parts.gate.admit(self.lane, tag, range, &mut self.out) {
            Admission::Go => self.submit(tag),
            Admission::Wait => self.waiting.push_back(tag),
        }
        for copy in self.out.drain(..) {
            self.copies.add(copy);
        }
    }

    /// Gives the request, or what is left of it, to the backing device.
    fn submit(&mut self, tag: u16) {
        let request = self.requests[usize::from(tag)];
        let (offset, left) =
            (request.offset + u64::from(request.done), request.bytes - u64::from(request.done));
        let fua = if request.flags & abi::IO_FUA == 0 { 0 } else { libc::RWF_DSYNC };
        let entry = match request.op {
            abi::OP_READ => opcode::Read::new(BACKING, self.buffer(tag, request.done), left as u32)
                .offset(offset)
                .build(),
            abi::OP_WRITE => {
                opcode::Write::new(BACKING, self.buffer(tag, request.done), left as u32)
                    .offset(offset)
                    .rw_flags(fua)
                    .build()
            }
            // A flush of the device: it has no page cache of ours that could be dirty.
            abi::OP_FLUSH => opcode::Fsync::new(BACKING).flags(types::FsyncFlags::DATASYNC).build(),
            abi::OP_WRITE_ZEROES => {
                // Punching lets the device unmap; it refuses where it cannot.
                let how = if request.plain_zeroes || request.flags & abi::IO_NOUNMAP != 0 {
                    libc::FALLOC_FL_ZERO_RANGE
                } else {
                    libc::FALLOC_FL_PUNCH_HOLE
                };
                opcode::Fallocate::new(BACKING, left)
                    .offset(offset)
                    .mode(how | libc::FALLOC_FL_KEEP_SIZE)
                    .build()
            }
            _ => {
                self.discards.as_ref().expect("there is a backing").ask(tag, offset, left);
                return;
            }
        };
        self.push(entry, IO, tag.into());
    }

    fn buffer(&self, tag: u16, done: u32) -> *mut u8 {
        self.buffers.at(usize::from(tag) * self.parts.buffer_bytes as usize + done as usize)
    }

    /// The backing device has done with a request, or with a part of it.
    fn went_down(&mut self, tag: u16, result: i32) {
        let request = &mut self.requests[usize::from(tag)];
        if result == -libc::EINTR || result == -libc::EAGAIN {
            return self.submit(tag);
        }
        let moves = matches!(request.op, abi::OP_READ | abi::OP_WRITE);
        let result = match result {
            1.. if moves => {
                request.done += result.unsigned_abs();
                if u64::from(request.done) < request.bytes {
                    return self.submit(tag);
                }
                request.done.cast_signed()
            }
            // It ends before its size: gone, or smaller than it was.
            0 if moves => -libc::EIO,
            0.. => 0,
            error
                if request.op == abi::OP_WRITE_ZEROES
                    && error == -libc::EOPNOTSUPP
                    && !request.plain_zeroes =>
            {
                request.plain_zeroes = true;
                return self.submit(tag);
            }
            error => error,
        };
        if matches!(request.op, abi::OP_WRITE | abi::OP_DISCARD | abi::OP_WRITE_ZEROES) {
            let wake = self.parts.gate.completed(self.lane, tag);
            if let Some(log) = &self.parts.log {
                log.leave(self.lane, tag);
            }
            self.wake(wake);
        }
        self.answer(tag, result);
    }

    fn copied(&mut self, index: usize, result: i32) {
        match self.copies.went_on(index, result, &self.parts.gate) {
            Ok(entry) => self.push(entry, COPY, index as u32),
            Err(wake) => self.wake(wake),
        }
    }

    fn wake(&mut self, lanes: Wake) {
        let mut lanes = lanes;
        while lanes != 0 {
            let lane = lanes.trailing_zeros() as usize;
            lanes &= lanes - 1;
            if lane == self.lane {
                self.retry = true;
            } else {
                ring_bell(&self.parts.events[lane]);
            }
        }
    }

    /// Another queue has woken this one, or a discard is done.
    fn woken(&mut self) {
        self.retry = true;
        while let Some((tag, result)) = self.discards.as_ref().and_then(Discards::fetch) {
            self.went_down(tag, result);
        }
        self.listen();
    }

    fn listen(&mut self) {
        let to = (&raw mut *self.event).cast::<u8>();
        self.push(opcode::Read::new(EVENT, to, 8).build(), WOKEN, 0);
    }

    /// Answers a request and asks for the next one of its tag.
    fn answer(&mut self, tag: u16, result: i32) {
        self.push(self.command(abi::COMMIT_AND_FETCH_REQ, tag, result), FETCH, tag.into());
    }

    fn command(&self, op: u32, tag: u16, result: i32) -> squeue::Entry {
        let addr = self.buffer(tag, 0) as u64;
        let command = IoCommand { q_id: self.parts.qid, tag, result, addr };
        opcode::UringCmd16::new(CHARACTER, op).cmd(command.bytes()).build()
    }

    fn push(&mut self, entry: squeue::Entry, kind: u64, index: u32) {
        let entry = entry.user_data(kind << 32 | u64::from(index));
        // SAFETY: what the entry points to lives as long as the ring: buffers, event and slots are
        // freed after it, and each belongs to one operation at a time.
        unsafe { self.ring.submission().push(&entry) }
            .expect("the ring has room for every request, every copy and the event");
    }
}

/// Wakes the queue of this event. It counts; one that is full has woken it already.
fn ring_bell(event: &EventFd) {
    let _ = event.write(1);
}
