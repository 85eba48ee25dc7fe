//! One daemon of a role per configuration.
//!
//! A record lock of the process, not of the open file: a child that a killed daemon leaves behind
//! for a moment does not hold it, so nothing left behind hinders a start. The file stays; only
//! the lock counts. The file must not be opened a second time in this process (that would drop it).

use crate::cli::failure::{Exit, Failure};
use crate::config::Paths;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// The process that holds the lock of `role`; none if nobody does. Takes and makes nothing. Not to
/// be asked by a daemon of this role itself: closing the file would drop its lock.
pub fn holder(paths: &Paths, role: &str) -> std::io::Result<Option<i32>> {
    holder_of(&paths.run.join(format!("{role}.lock")))
}

fn holder_of(path: &Path) -> std::io::Result<Option<i32>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut lock = write_lock();
    fcntl(&file, FcntlArg::F_GETLK(&mut lock))?;
    Ok((lock.l_type != libc::F_UNLCK as libc::c_short).then_some(lock.l_pid))
}

fn write_lock() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Held as long as the daemon runs.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of `role`, or says which process has it.
    pub fn take(paths: &Paths, role: &str) -> Result<Self, Failure> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&paths.run)
            .map_err(|error| Failure::io("create", &paths.run, &error))?;
        let path = paths.run.join(format!("{role}.lock"));
        if let Some(lock) = Self::try_take(&path)? {
            return Ok(lock);
        }
        let holder = match Self::holder_of(&path)? {
            Some(pid) => format!(" (process {pid})"),
            None => String::new(),
        };
        let what = format!("another {role} daemon{holder} runs with {}", paths.config.display());
        Err(Failure::new(Exit::TryLater, what)
            .still("the one that runs is not affected")
            .hint("stop that one first, or give this one its own --config-dir"))
    }

    /// Takes the lock of this file, which is made if it is not there; none if another process has it.
    pub fn try_take(path: &Path) -> Result<Option<Self>, Failure> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| Failure::io("open", path, &error))?;
        match fcntl(&file, FcntlArg::F_SETLK(&write_lock())) {
            Ok(_) => Ok(Some(Self { _file: file })),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(error) => Err(Failure::io("lock", path, &error.into())),
        }
    }

    /// The process that holds the lock of this file, as [`holder`].
    pub fn holder_of(path: &Path) -> Result<Option<i32>, Failure> {
        holder_of(path).map_err(|error| Failure::io("ask for the lock of", path, &error))
    }
}
