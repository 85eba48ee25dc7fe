//! The threads of one client's connection, after it has chosen its export.
//!
//! One thread reads requests. While the device answers at once it also serves them, and sends the
//! answers to all that came together in one piece: a thread that is woken for each would cost more
//! than the request. Where the device takes its time, and for everything that waits for a medium,
//! requests go to workers of this connection, so that many are in flight.
//!
//! Bounds: [`CONNECTION_BYTES_MAX`] of payloads, [`QUEUE_MAX`] requests and [`WORKERS_MAX`] threads
//! with a buffer each. At a bound the reading thread stops reading; a client that takes no answers
//! stops only itself.

use super::protocol::{Command, REQUEST_BYTES, Request, Step, Terms, decode};
use super::serve::{PIECE_BYTES_MAX, Replies, answer_bytes, serve};
use super::stream::Stream;
use super::{CONNECTION_BYTES_MAX, Device, QUEUE_MAX, WORKERS_MAX};
use crossbeam::channel::{Receiver, Sender, bounded};
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Stack of a thread that serves requests.
pub const STACK_BYTES: usize = 512 << 10;
/// Requests and payloads up to this size are served where they were received.
const INPUT_BYTES: usize = PIECE_BYTES_MAX + (4 << 10);
/// Read beyond what is needed: a queue of small requests comes in one go.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// A request that took longer than this, and a nanosecond a byte, was slow.
const SLOW_AFTER: Duration = Duration::from_micros(150);
/// What a slow request adds, a quick one takes one off; at most [`SLOWNESS_MAX`].
const SLOWNESS_STEP: u32 = 16;
const SLOWNESS_MAX: u32 = 128;
/// From here on workers serve. One slow request alone is chance.
const SLOWNESS_LIMIT: u32 = 24;

/// What the threads of a connection share.
pub struct Connection {
    stream: Arc<Stream>,
    device: Arc<dyn Device>,
    terms: Terms,
    /// Bytes of payloads that workers hold, or will.
    held: Mutex<usize>,
    released: Condvar,
    /// Requests that workers hold. Relaxed, as the next: both only choose who serves a request.
    in_flight: AtomicUsize,
    slowness: AtomicU32,
}

struct Job {
    request: Request,
    payload: Vec<u8>,
    _held: Option<Held>,
}

/// Bytes counted against the connection until dropped.
struct Held {
    connection: Arc<Connection>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        let connection = &self.connection;
        *connection.held.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        connection.released.notify_one();
    }
}

impl Connection {
    /// Serves the client until it leaves or cannot be understood: the body of the reading thread.
    pub fn serve(stream: Arc<Stream>, device: Arc<dyn Device>, terms: Terms) -> io::Result<()> {
        let connection = Arc::new(Self {
            stream: stream.clone(),
            device,
            terms,
            held: Mutex::default(),
            released: Condvar::new(),
            in_flight: AtomicUsize::new(0),
            slowness: AtomicU32::new(0),
        });
        let mut workers = Workers::new(connection.clone());
        let mut replies = Replies::new(&stream);
        let ended = connection.read_requests(&mut workers, &mut replies);
        // What was asked for before is answered, even to one who has said goodbye.
        workers.finish();
        ended
    }

    fn read_requests(
        self: &Arc<Self>,
        workers: &mut Workers,
        replies: &mut Replies<'_>,
    ) -> io::Result<()> {
        let mut input = Input::new();
        loop {
            let request = match decode(input.bytes(), &self.terms)? {
                Step::More(needed) => {
                    if !input.fill(needed, &self.stream, replies)? {
                        return Ok(());
                    }
                    continue;
                }
                Step::Refused { cookie, structured, error, payload_bytes } => {
                    input.consume(REQUEST_BYTES);
                    input.skip(payload_bytes, &self.stream, replies)?;
                    replies.refuse(cookie, structured, error)?;
                    continue;
                }
                Step::Request(request) => request,
            };
            input.consume(REQUEST_BYTES);
            let payload_bytes = match request.command {
                Command::Disconnect => return replies.send(),
                Command::Write => request.bytes as usize,
                _ => 0,
            };
            if payload_bytes <= INPUT_BYTES {
                input.need(payload_bytes, &self.stream, replies)?;
            }
            let alone = input.bytes().len() == payload_bytes;
            if payload_bytes <= INPUT_BYTES && self.serve_here(&request, alone) {
                let _held = self.hold(answer_bytes(&request, &self.terms));
                self.serve_one(&request, &input.bytes()[..payload_bytes], replies)?;
                input.consume(payload_bytes);
                continue;
            }
            // Nobody shall wait for an answer until the queue has room again.
            replies.send()?;
            let held = self.hold(payload_bytes.max(answer_bytes(&request, &self.terms)));
            let payload = input.take(payload_bytes, &self.stream)?;
            workers.give(Job { request, payload, _held: held })?;
        }
    }

    /// Whether the reading thread serves the request itself.
    fn serve_here(&self, request: &Request, alone: bool) -> bool {
        if waits_for_medium(request) {
            return false;
        }
        self.slowness.load(Ordering::Relaxed) < SLOWNESS_LIMIT
            || alone && self.in_flight.load(Ordering::Relaxed) == 0
    }

    fn serve_one(
        &self,
        request: &Request,
        payload: &[u8],
        replies: &mut Replies<'_>,
    ) -> io::Result<()> {
        let (start, sending) = (Instant::now(), replies.sending());
        serve(&*self.device, &self.terms, request, payload, replies)?;
        if !waits_for_medium(request) {
            let sending = replies.sending() - sending;
            self.took(start.elapsed().saturating_sub(sending), request.bytes);
        }
        Ok(())
    }

    /// Notes how long a device took. Two threads at once may lose a step: it is a tendency.
    fn took(&self, elapsed: Duration, bytes: u32) {
        let slow = elapsed > SLOW_AFTER + Duration::from_nanos(u64::from(bytes));
        let before = self.slowness.load(Ordering::Relaxed);
        let after = if slow {
            (before + SLOWNESS_STEP).min(SLOWNESS_MAX)
        } else {
            before.saturating_sub(1)
        };
        if after != before {
            self.slowness.store(after, Ordering::Relaxed);
        }
    }

    /// Counts so many bytes, after waiting until they are within the bound.
    fn hold(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        if bytes == 0 {
            return None;
        }
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let too_many = |held: &mut usize| *held + bytes > CONNECTION_BYTES_MAX;
        let held = self.released.wait_while(held, too_many);
        *held.unwrap_or_else(PoisonError::into_inner) += bytes;
        Some(Held { connection: self.clone(), bytes })
    }

    fn work(&self, jobs: &Receiver<Job>) {
        let mut replies = Replies::new(&self.stream);
        for job in jobs {
            // What replies held when a device panicked is never sent: the connection ends.
            let served = catch_unwind(AssertUnwindSafe(|| {
                self.serve_one(&job.request, &job.payload, &mut replies)?;
                replies.send()
            }));
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            if !matches!(served, Ok(Ok(()))) {
                // The reading thread notices; what is still in the queue is served to nobody.
                self.stream.shut_down();
            }
        }
    }
}

/// Others shall not wait with these.
fn waits_for_medium(request: &Request) -> bool {
    request.fua || request.command == Command::Flush
}

/// The threads that serve what the reading one does not.
struct Workers {
    connection: Arc<Connection>,
    jobs: Option<Sender<Job>>,
    queue: Receiver<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    fn new(connection: Arc<Connection>) -> Self {
        let (jobs, queue) = bounded(QUEUE_MAX);
        Self { connection, jobs: Some(jobs), queue, threads: Vec::new() }
    }

    /// Hands a request over; waits while the queue is full.
    fn give(&mut self, job: Job) -> io::Result<()> {
        let busy = self.connection.in_flight.fetch_add(1, Ordering::Relaxed);
        if busy >= self.threads.len() && self.threads.len() < WORKERS_MAX {
            let (connection, queue) = (self.connection.clone(), self.queue.clone());
            let body = move || connection.work(&queue);
            let name = "nbd-worker".to_owned();
            match thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(body) {
                Ok(thread) => self.threads.push(thread),
                // Those that there are serve on.
                Err(error) if self.threads.is_empty() => return Err(error),
                Err(_) => {}
            }
        }
        let jobs = self.jobs.as_ref().expect("open until finish");
        jobs.send(job).map_err(|_| io::Error::from(ErrorKind::BrokenPipe))
    }

    /// Waits until all that was given is answered.
    fn finish(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic has ended the connection already.
            let _ = thread.join();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if thread::panicking() {
            self.connection.stream.shut_down();
        }
        self.finish();
    }
}

/// What was received and not yet used: `buffer[begin..end]`.
struct Input {
    buffer: Box<[u8]>,
    begin: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self { buffer: vec![0; INPUT_BYTES].into(), begin: 0, end: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.begin..self.end]
    }

    fn consume(&mut self, bytes: usize) {
        self.begin += bytes;
        if self.begin == self.end {
            (self.begin, self.end) = (0, 0);
        }
    }

    /// Waits for so many bytes in one piece; `false`: the client left in between two requests.
    fn fill(
        &mut self,
        needed: usize,
        stream: &Stream,
        replies: &mut Replies<'_>,
    ) -> io::Result<bool> {
        if self.begin + needed > self.buffer.len() {
            self.buffer.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
        while self.end - self.begin < needed {
            // It may want these before it sends more.
            replies.send()?;
            let rest = self.begin + needed - self.end;
            let limit = (self.end + rest.max(READ_AHEAD_BYTES)).min(self.buffer.len());
            match stream.read(&mut self.buffer[self.end..limit])? {
                0 if self.begin == self.end => return Ok(false),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => self.end += count,
            }
        }
        Ok(true)
    }

    fn need(&mut self, bytes: usize, stream: &Stream, replies: &mut Replies<'_>) -> io::Result<()> {
        if self.fill(bytes, stream, replies)? {
            Ok(())
        } else {
            Err(ErrorKind::UnexpectedEof.into())
        }
    }

    /// Reads over so many bytes.
    fn skip(&mut self, bytes: u32, stream: &Stream, replies: &mut Replies<'_>) -> io::Result<()> {
        let mut left = bytes as usize;
        while left > 0 {
            self.need(1, stream, replies)?;
            let part = left.min(self.bytes().len());
            self.consume(part);
            left -= part;
        }
        Ok(())
    }

    /// Takes so many bytes out, whatever their number; the caller has counted them.
    fn take(&mut self, bytes: usize, stream: &Stream) -> io::Result<Vec<u8>> {
        let have = bytes.min(self.bytes().len());
        if have == bytes {
            let taken = self.bytes()[..bytes].to_vec();
            self.consume(bytes);
            return Ok(taken);
        }
        let mut taken = vec![0; bytes];
        taken[..have].copy_from_slice(&self.bytes()[..have]);
        self.consume(have);
        let mut at = have;
        while at < bytes {
            match stream.read(&mut taken[at..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => at += count,
            }
        }
        Ok(taken)
    }
}
