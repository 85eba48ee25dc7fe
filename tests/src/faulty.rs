//! Disks that are slow, fail on demand, or lose their power: nbdkit with filters, nbdfuse, and a
//! loop device over the file that it serves. They are block devices like any other.

use crate::block::{LoopDevice, Mount, open, run};
use crate::daemon::Child;
use crate::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// More than the writes and reads that a test has in flight.
const CONNECTIONS: &str = "16";
const START_LIMIT: Duration = Duration::from_secs(10);

/// A loop device over an nbdkit. (Fields are dropped in this order: each lies on the next.)
pub struct NbdDevice {
    device: LoopDevice,
    _mount: FuseMount,
    _fuse: Child,
    server: Child,
}

struct FuseMount(PathBuf);

impl Drop for FuseMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

impl NbdDevice {
    /// Of `bytes`, served by nbdkit with these arguments, its files in `dir`. With enough
    /// connections that no read waits behind a write, and the loop device in direct mode (else its
    /// page cache would stand in for the disk).
    pub fn new(dir: &Path, name: &str, bytes: u64, arguments: &[String]) -> Self {
        let socket = dir.join(format!("{name}.sock"));
        let mountpoint = dir.join(name);
        // Left by one whose power was cut.
        let _ = std::fs::remove_file(&socket);
        File::create(&mountpoint).expect("a mount point");
        let server = Child::spawn(
            "nbdkit",
            Command::new("nbdkit").args(["--foreground", "--unix"]).arg(&socket).args(arguments),
        );
        wait_until("nbdkit listens", START_LIMIT, || {
            socket.exists().then_some(()).ok_or_else(|| server.log())
        });
        let fuse = Child::spawn(
            "nbdfuse",
            Command::new("nbdfuse")
                .args(["--connections", CONNECTIONS])
                .arg(&mountpoint)
                .arg("--unix")
                .arg(&socket),
        );
        wait_until("nbdfuse serves the file", START_LIMIT, || {
            let size = mountpoint.metadata().map(|m| m.len()).unwrap_or(0);
            (size == bytes).then_some(()).ok_or_else(|| fuse.log())
        });
        let device = LoopDevice::over(&mountpoint, true);
        Self { device, _mount: FuseMount(mountpoint), _fuse: fuse, server }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        self.device.path()
    }

    /// `loopN`: the volume's name.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// What answers for the medium: stopped, every read and write waits.
    pub fn medium(&self) -> Pid {
        self.server.pid()
    }

    /// Whether it answers at all: a disk that hangs, and comes back. Nothing of it is cached then.
    pub fn set_stalled(&self, stalled: bool) {
        if stalled {
            open(self.device.path()); // flushes and drops its page cache
        }
        let signal = if stalled { Signal::SIGSTOP } else { Signal::SIGCONT };
        // One whose power was cut is gone already.
        let _ = kill(self.server.pid(), signal);
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        // Taking the layers above down reads from it.
        self.set_stalled(false);
    }
}

/// A device of `bytes` of memory whose writes reach it `delay` after they were issued, while reads
/// are served at once.
pub fn slow_device(dir: &Path, bytes: u64, delay: Duration) -> NbdDevice {
    let delay = format!("delay-write={}ms", delay.as_millis());
    let arguments = ["--filter=delay", "memory", &bytes.to_string(), &delay];
    NbdDevice::new(dir, "slow", bytes, &arguments.map(str::to_owned))
}

/// What a [`FaultyStore`]'s disk can do to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Writes or reads end with EIO while they are told to.
    Errors,
    /// It has a volatile write cache, and its power can be cut.
    PowerCut,
}

/// A mounted ext4 on a disk with a [`Fault`].
pub struct FaultyStore {
    mount: Option<Mount>,
    device: Option<NbdDevice>,
    dir: PathBuf,
    bytes: u64,
    fault: Fault,
}

impl FaultyStore {
    /// A new one; its files lie in `dir`.
    pub fn new(dir: &Path, bytes: u64, fault: Fault) -> Self {
        File::create(dir.join("medium")).and_then(|file| file.set_len(bytes)).expect("a medium");
        let mut store = Self { mount: None, device: None, dir: dir.to_owned(), bytes, fault };
        store.power_on();
        store.device().device.format_ext4(&["-E", "nodiscard"]);
        store.mount();
        store
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Writes fail from now on, or no more.
    pub fn fail_writes(&self, fail: bool) {
        self.trigger("fail-writes", fail);
    }

    /// Reads fail from now on, or no more.
    pub fn fail_reads(&self, fail: bool) {
        self.trigger("fail-reads", fail);
    }

    fn trigger(&self, name: &str, on: bool) {
        let path = self.dir.join(name);
        if on {
            File::create(path).expect("a trigger");
        } else {
            std::fs::remove_file(path).expect("the trigger is there");
        }
    }

    /// The power goes: what was not flushed is lost, and from now on nothing can be read or written.
    pub fn cut_power(&mut self) {
        kill(self.device().server.pid(), Signal::SIGKILL).expect("kill our own nbdkit");
        let server = &mut self.device.as_mut().expect("it has a device").server;
        wait_until("nbdkit is gone", START_LIMIT, || {
            server.ended().map(drop).ok_or_else(|| "it runs".to_owned())
        });
    }

    /// Takes it apart and brings it back as its medium is: repaired, mounted again, nothing of it
    /// in the page cache. Nothing may use it.
    pub fn restore(&mut self) {
        self.mount.take().expect("it is mounted").unmount();
        // A new device each time: a mount namespace of somebody else's may still hold the old one.
        self.device = None;
        self.power_on();
        self.mount();
    }

    fn power_on(&mut self) {
        let at = |name: &str| self.dir.join(name).display().to_string();
        let arguments = match self.fault {
            Fault::Errors => vec![
                "--filter=error".to_owned(),
                "file".to_owned(),
                at("medium"),
                "error-pwrite-rate=100%".to_owned(),
                format!("error-pwrite-file={}", at("fail-writes")),
                "error-pread-rate=100%".to_owned(),
                format!("error-pread-file={}", at("fail-reads")),
            ],
            Fault::PowerCut => vec![
                "--filter=cache".to_owned(),
                "file".to_owned(),
                at("medium"),
                "cache=writeback".to_owned(),
                "cache-min-block-size=4096".to_owned(),
            ],
        };
        self.device = Some(NbdDevice::new(&self.dir, "disk", self.bytes, &arguments));
    }

    fn mount(&mut self) {
        let device = self.device().path().to_owned();
        // What was cut off in the middle is repaired by the journal; -p fails on anything worse.
        let ended = Command::new("e2fsck").arg("-p").arg(&device).output().expect("e2fsck runs");
        let talk = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.code().is_some_and(|code| code <= 1), "e2fsck: {talk}");
        self.mount = Some(Mount::new(&device, &self.path(), "defaults"));
        run("chmod", &["0700", self.path().to_str().expect("UTF-8")]);
    }

    fn device(&self) -> &NbdDevice {
        self.device.as_ref().expect("it has a device")
    }
}
