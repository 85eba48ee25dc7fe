//! Why a command did not succeed: exit code, what failed, what still works, what to type.
//!
//! The binary's edge: everything that can go wrong below becomes one of these, and only `main`
//! prints it. Exit codes are those of sysexits where one fits.

use secondsite_control::api::SCHEMA_VERSION;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

/// Exit codes of every command (`check` alone will have its own).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The operation failed.
    Failed = 1,
    /// Wrong usage.
    Usage = 64,
    /// Source and replica differ, or data is not what it should be.
    DataDiffers = 65,
    /// What is needed is not there: control does not answer, no BTF.
    Unavailable = 69,
    /// Reading or writing failed.
    Io = 74,
    /// Not now; the same command may succeed later.
    TryLater = 75,
    /// Not allowed.
    Permission = 77,
    /// The configuration is wrong or missing.
    Config = 78,
}

impl Exit {
    /// The code that a peer named; what is unknown here becomes a plain failure.
    pub fn from_code(code: u8) -> Self {
        match code {
            64 => Self::Usage,
            65 => Self::DataDiffers,
            69 => Self::Unavailable,
            74 => Self::Io,
            75 => Self::TryLater,
            77 => Self::Permission,
            78 => Self::Config,
            _ => Self::Failed,
        }
    }
}

/// A command that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// How the process ends.
    pub exit: Exit,
    /// What failed, where and why.
    pub message: String,
    /// What goes on all the same; empty if there is nothing to say.
    pub still: String,
    /// One command to type, or one thing to do; empty if there is none.
    pub hint: String,
}

impl Failure {
    /// A failure without advice.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), still: String::new(), hint: String::new() }
    }

    /// Adds what to type or do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Adds what still works.
    pub fn still(mut self, still: impl Into<String>) -> Self {
        self.still = still.into();
        self
    }

    /// An I/O error at a path; a denied permission and a missing file have their own exit codes.
    pub fn io(what: &str, path: &Path, error: &std::io::Error) -> Self {
        let exit =
            if error.kind() == ErrorKind::PermissionDenied { Exit::Permission } else { Exit::Io };
        let failure = Self::new(exit, format!("{what} {}: {error}", path.display()));
        match (exit, error.kind()) {
            (Exit::Permission, _) => failure.hint("run as root"),
            (_, ErrorKind::StorageFull) => failure.hint(format!("df -h {}", path.display())),
            _ => failure.hint(format!("ls -ld {}", path.parent().unwrap_or(path).display())),
        }
    }

    /// The document that `--json` prints instead of a result.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "schema_version": SCHEMA_VERSION,
            "error": {
                "exit_code": self.exit as u8,
                "message": self.message,
                "still_works": self.still,
                "hint": self.hint,
            },
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secondsite: {}", self.message)?;
        if !self.still.is_empty() {
            write!(f, "\n  still works: {}", self.still)?;
        }
        if !self.hint.is_empty() {
            write!(f, "\n  try: {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}
