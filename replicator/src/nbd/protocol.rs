//! The bytes of NBD's transmission phase: requests out of bytes, replies into bytes. No I/O.
//!
//! [`decode`] is the one place where a request is judged: what it passes lies within the export, is
//! allowed there, and asks for no more memory than [`PAYLOAD_BYTES_MAX`]. All numbers are big-endian.

use super::PAYLOAD_BYTES_MAX;
use std::io;

/// Bytes of a request without its payload.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply without data.
pub const SIMPLE_BYTES: usize = 16;
/// Bytes of a data chunk before its data.
pub const DATA_CHUNK_BYTES: usize = 28;
/// The id of the one metadata context, base:allocation.
pub const ALLOCATION_ID: u32 = 1;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_DF: u16 = 1 << 2;
const FLAG_REQ_ONE: u16 = 1 << 3;
const FLAG_FAST_ZERO: u16 = 1 << 4;

const CHUNK_DONE: u16 = 1;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_OFFSET_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = (1 << 15) + 1;
/// Hole, and reads as zero.
const STATE_HOLE_ZERO: u32 = 3;

/// What the client said cannot be read; nothing that follows on its connection can.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the client sent {0} where the protocol has something else")]
pub struct Nonsense(pub &'static str);

impl From<Nonsense> for io::Error {
    fn from(nonsense: Nonsense) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, nonsense)
    }
}

/// Error numbers of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorNumber {
    NotPermitted = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    NotSupported = 95,
    Shutdown = 108,
}

impl ErrorNumber {
    /// The number for a device's error. `NotSupported` only where a client asked for a fast zero:
    /// elsewhere the protocol forbids it.
    pub fn of(error: &io::Error, fast: bool) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => Self::NotPermitted,
            Some(libc::ENOMEM) => Self::NoMemory,
            Some(libc::EINVAL) => Self::Invalid,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Self::NoSpace,
            Some(libc::EOPNOTSUPP) if fast => Self::NotSupported,
            Some(libc::ESHUTDOWN) => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

/// What server and client agreed on for one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export.
    pub bytes: u64,
    pub read_only: bool,
    /// Reads are answered in chunks.
    pub structured: bool,
    /// base:allocation may be asked for.
    pub allocation: bool,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read { one_chunk: bool },
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes { no_hole: bool, fast: bool },
    BlockStatus { one: bool },
}

/// A request that may be served as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub fua: bool,
    /// The client's name for it.
    pub cookie: u64,
    pub offset: u64,
    pub bytes: u32,
}

/// What the bytes at hand amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing yet: so many bytes are needed.
    More(usize),
    /// A request of [`REQUEST_BYTES`]; a write's payload of `bytes` follows.
    Request(Request),
    /// One that is answered with an error, after `payload_bytes` that are of no interest.
    Refused { cookie: u64, structured: bool, error: ErrorNumber, payload_bytes: u32 },
}

/// Reads the request at the beginning of `input`.
pub fn decode(input: &[u8], terms: &Terms) -> Result<Step, Nonsense> {
    let Some(header) = input.first_chunk::<REQUEST_BYTES>() else {
        return Ok(Step::More(REQUEST_BYTES));
    };
    if number::<4>(header, 0) != u64::from(REQUEST_MAGIC) {
        return Err(Nonsense("no request"));
    }
    let (flags, kind) = (number::<2>(header, 4) as u16, number::<2>(header, 6) as u16);
    let (cookie, offset) = (number::<8>(header, 8), number::<8>(header, 16));
    let bytes = number::<4>(header, 24) as u32;
    Ok(match judge(kind, flags, offset, bytes, terms) {
        Ok(command) => {
            let fua = flags & FLAG_FUA != 0;
            Step::Request(Request { command, fua, cookie, offset, bytes })
        }
        Err(error) => Step::Refused {
            cookie,
            // Only these two have an answer that a simple reply cannot be.
            structured: terms.structured && matches!(kind, 0 | 7),
            error,
            payload_bytes: if kind == 1 { bytes } else { 0 },
        },
    })
}

fn judge(
    kind: u16,
    flags: u16,
    offset: u64,
    bytes: u32,
    terms: &Terms,
) -> Result<Command, ErrorNumber> {
    let has = |flag| flags & flag != 0;
    let (command, allowed) = match kind {
        0 => {
            (Command::Read { one_chunk: has(FLAG_DF) }, if terms.structured { FLAG_DF } else { 0 })
        }
        1 => (Command::Write, 0),
        2 => (Command::Disconnect, 0),
        3 => (Command::Flush, 0),
        4 => (Command::Trim, 0),
        5 => (Command::Cache, 0),
        6 => (
            Command::WriteZeroes { no_hole: has(FLAG_NO_HOLE), fast: has(FLAG_FAST_ZERO) },
            FLAG_NO_HOLE | FLAG_FAST_ZERO,
        ),
        7 if terms.allocation => (Command::BlockStatus { one: has(FLAG_REQ_ONE) }, FLAG_REQ_ONE),
        _ => return Err(ErrorNumber::Invalid),
    };
    if command == Command::Disconnect {
        return Ok(command);
    }
    // FUA is let pass everywhere: clients are known to set it on any command.
    if flags & !(allowed | FLAG_FUA) != 0 {
        return Err(ErrorNumber::Invalid);
    }
    let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes { .. });
    if writes && terms.read_only {
        return Err(ErrorNumber::NotPermitted);
    }
    if command == Command::Flush {
        return if (offset, bytes) == (0, 0) { Ok(command) } else { Err(ErrorNumber::Invalid) };
    }
    if offset.checked_add(u64::from(bytes)).is_none_or(|end| end > terms.bytes) {
        return Err(match command {
            Command::Write | Command::WriteZeroes { .. } => ErrorNumber::NoSpace,
            _ => ErrorNumber::Invalid,
        });
    }
    match command {
        // Block status needs a run to answer with, a chunk of data a byte.
        Command::BlockStatus { .. } | Command::Read { .. } if bytes == 0 => {
            Err(ErrorNumber::Invalid)
        }
        Command::Read { .. } | Command::Write if bytes > PAYLOAD_BYTES_MAX => {
            Err(ErrorNumber::Overflow)
        }
        _ => Ok(command),
    }
}

/// The big-endian number of `N` bytes at `at`.
pub fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A reply without data; before data, for a read that is answered simply.
pub fn simple(cookie: u64, error: Option<ErrorNumber>) -> [u8; SIMPLE_BYTES] {
    let mut reply = [0; SIMPLE_BYTES];
    put(&mut reply, 0, &SIMPLE_MAGIC.to_be_bytes());
    put(&mut reply, 4, &error.map_or(0, |error| error as u32).to_be_bytes());
    put(&mut reply, 8, &cookie.to_be_bytes());
    reply
}

/// What stands before the data of a chunk.
pub fn data_chunk(cookie: u64, offset: u64, bytes: u32, done: bool) -> [u8; DATA_CHUNK_BYTES] {
    let mut chunk = [0; DATA_CHUNK_BYTES];
    put(&mut chunk, 0, &chunk_header(cookie, CHUNK_OFFSET_DATA, done, bytes + 8));
    put(&mut chunk, 20, &offset.to_be_bytes());
    chunk
}

/// A chunk that says "zeros".
pub fn hole_chunk(cookie: u64, offset: u64, bytes: u32, done: bool) -> [u8; 32] {
    let mut chunk = [0; 32];
    put(&mut chunk, 0, &chunk_header(cookie, CHUNK_OFFSET_HOLE, done, 12));
    put(&mut chunk, 20, &offset.to_be_bytes());
    put(&mut chunk, 28, &bytes.to_be_bytes());
    chunk
}

/// The last chunk of what failed.
pub fn error_chunk(cookie: u64, error: ErrorNumber) -> [u8; 26] {
    let mut chunk = [0; 26];
    put(&mut chunk, 0, &chunk_header(cookie, CHUNK_ERROR, true, 6));
    put(&mut chunk, 20, &(error as u32).to_be_bytes());
    chunk
}

/// Bytes of [`status_chunk`] for so many runs.
pub const fn status_bytes(runs: usize) -> usize {
    24 + 8 * runs
}

/// The answer to block status: length and "is a hole" of each run.
pub fn status_chunk(cookie: u64, runs: &[(u32, bool)], chunk: &mut [u8]) {
    let length = status_bytes(runs.len()) as u32 - 20;
    put(chunk, 0, &chunk_header(cookie, CHUNK_BLOCK_STATUS, true, length));
    put(chunk, 20, &ALLOCATION_ID.to_be_bytes());
    for (index, (bytes, hole)) in runs.iter().enumerate() {
        put(chunk, 24 + 8 * index, &bytes.to_be_bytes());
        let state = if *hole { STATE_HOLE_ZERO } else { 0 };
        put(chunk, 28 + 8 * index, &state.to_be_bytes());
    }
}

fn chunk_header(cookie: u64, kind: u16, done: bool, length: u32) -> [u8; 20] {
    let mut header = [0; 20];
    put(&mut header, 0, &CHUNK_MAGIC.to_be_bytes());
    put(&mut header, 4, &if done { CHUNK_DONE } else { 0 }.to_be_bytes());
    put(&mut header, 6, &kind.to_be_bytes());
    put(&mut header, 8, &cookie.to_be_bytes());
    put(&mut header, 16, &length.to_be_bytes());
    header
}

/// Copies `bytes` to `at`.
fn put(target: &mut [u8], at: usize, bytes: &[u8]) {
    target[at..at + bytes.len()].copy_from_slice(bytes);
}
