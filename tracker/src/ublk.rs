//! A block device in front of another one, served from user space (ublk), and what a filter needs
//! around it.
//!
//! [`control`] makes devices, takes them over and removes them; [`backing`] opens what is written to
//! and says which limits it has; [`reserve`] is where blocks are
//! preserved beyond memory, and where a [`log`] makes marks outlive a reboot; [`queue`] carries requests down and answers up; [`device`] puts
//! them together. The devices outlive the process that serves them: with user recovery and reissue
//! I/O waits while it is away, and what was on its way is issued again.

pub mod abi;
pub mod backing;
pub mod control;
pub mod device;
mod discard;
pub mod log;
mod memory;
mod preserve;
mod queue;
pub mod reserve;

pub use backing::Backing;
pub use control::Control;
pub use device::{Options, Served, Volume};
pub use log::Log;
pub use reserve::Reserve;

use std::io;
use std::path::{Path, PathBuf};

/// What could not be done to which device, why, and what helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {}: {cause}", subject.display())]
pub struct UblkError {
    /// The operation.
    pub what: &'static str,
    /// The device node.
    pub subject: PathBuf,
    /// Why.
    pub cause: String,
    /// What to type or do; empty if there is nothing.
    pub hint: String,
    /// The kernel's number; 0 if it did not say no.
    pub errno: i32,
}

impl UblkError {
    pub(crate) fn new(what: &'static str, subject: impl AsRef<Path>, error: &io::Error) -> Self {
        Self {
            what,
            subject: subject.as_ref().to_path_buf(),
            cause: error.to_string(),
            hint: String::new(),
            errno: error.raw_os_error().unwrap_or(0),
        }
    }

    pub(crate) fn cause(mut self, cause: impl Into<String>) -> Self {
        self.cause = cause.into();
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}
