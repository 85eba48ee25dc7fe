//! Our NBD server: devices by name, on a unix socket or TCP, to any client of the field.
//!
//! [`Device`] is what is served, [`Server`] is what serves it. Below: [`protocol`] and [`negotiation`]
//! turn bytes into requests and answers and do no I/O; [`stream`] is a socket with or without TLS;
//! [`connection`] holds the threads of one client; [`serve`] is one request against a device.
//!
//! Invariants: a length that a client names is checked before memory is taken for it; what one
//! client holds is bounded (below), and no thread or memory of it is shared with another; an error
//! of a device answers the one request that met it.

mod connection;
mod negotiation;
mod protocol;
mod serve;
mod server;
mod stream;
#[cfg(test)]
mod tests;

pub use server::{Server, ServerError};

use std::io;

/// Most bytes that one read or write may carry: what every client may count on.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Most bytes of payloads on their way for one connection; a request beyond it waits.
pub const CONNECTION_BYTES_MAX: usize = 32 << 20;
/// Most connections of a server; one more is closed at once.
pub const CONNECTIONS_MAX: usize = 128;
/// Most threads of a connection besides the one that reads; they start when a device is slow.
pub const WORKERS_MAX: usize = 16;
/// Most requests that wait for one of them; the next one stays in the socket.
pub const QUEUE_MAX: usize = 32;
/// A client must have chosen its export after this time.
pub const NEGOTIATION_SECONDS_MAX: u64 = 30;
/// Longest name of an export, as the protocol has it.
pub const NAME_BYTES_MAX: usize = 4096;

// A request of the largest size must fit, or it would wait for ever.
const _: () = assert!(PAYLOAD_BYTES_MAX as usize <= CONNECTION_BYTES_MAX);

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its length; never 0.
    pub bytes: u64,
    /// It takes no space, and reads as zero.
    pub hole: bool,
}

/// How a range is zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Zeroing {
    /// Space for the range must be there afterwards.
    pub no_hole: bool,
    /// Fails with `EOPNOTSUPP` at once if it would take as long as a write.
    pub fast: bool,
}

/// What is served: a device of bytes. Many threads use it at once; ranges lie within it.
///
/// A device is read-only unless it says otherwise, and then needs only the first three methods.
/// Errors are answered by their number: `ENOSPC`, `ENOMEM`, `EINVAL`, `EPERM` and `EROFS` as such,
/// all others as `EIO`.
pub trait Device: Send + Sync {
    /// Its size; the same as long as it is served.
    fn bytes(&self) -> u64;

    /// Fills `buffer` from `offset` on.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// What lies in the range, in order from `offset` on: at least one run, at most `limit`, which
    /// together may end before the range does, but not behind it.
    fn extents(&self, offset: u64, bytes: u64, limit: usize) -> io::Result<Vec<Run>>;

    /// Whether everything below fails.
    fn read_only(&self) -> bool {
        true
    }

    /// Writes; durable after the next [`Self::flush`].
    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    /// Makes the range read as zero.
    fn zero(&self, _offset: u64, _bytes: u64, _how: Zeroing) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    /// The content of the range is of no more use; what it reads as afterwards is open.
    fn trim(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    /// Everything that has been answered, on whatever connection, is durable when this returns.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
