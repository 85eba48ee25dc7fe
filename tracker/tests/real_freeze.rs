//! Freezing a real ext4, and who thaws it when somebody dies. Needs root.
//!
//! The process that freezes is always a helper (this program again), so that it can be killed.

mod real;

use real::{Loop, folder, run};
use secondsite_tracker::device::Device;
use secondsite_tracker::freeze::{Freezer, sync_file_system};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Set in the helper: where its file system is.
const HELPER: &str = "TRACKER_FREEZE_HELPER";
/// Longer than anything may stay frozen.
const SOON: Duration = Duration::from_secs(3);

/// An ext4 on a loop device, mounted twice.
struct Mounted {
    folder: tempfile::TempDir,
    disk: Loop,
}

impl Mounted {
    fn new() -> Self {
        let folder = folder();
        let disk = Loop::sized(folder.path(), 32 << 20);
        let node = disk.path.to_str().unwrap().to_string();
        run("mkfs.ext4", &["-q", &node]);
        let mounted = Self { folder, disk };
        for name in ["a b", "again"] {
            std::fs::create_dir(mounted.at(name)).unwrap();
        }
        run("mount", &[&node, mounted.at("a b").to_str().unwrap()]);
        let (from, to) = (mounted.at("a b"), mounted.at("again"));
        run("mount", &["--bind", from.to_str().unwrap(), to.to_str().unwrap()]);
        mounted
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for name in ["again", "a b"] {
            let _ = thaw_by_hand(&self.at("a b"));
            let _ = Command::new("umount").arg(self.at(name)).status();
        }
    }
}

fn thaw_by_hand(path: &Path) -> bool {
    let Ok(file) = std::fs::File::open(path) else { return false };
    // SAFETY: FITHAW on a descriptor that is open; its argument is not used.
    unsafe { libc::ioctl(file.as_raw_fd(), 0xc004_5878u32 as libc::Ioctl, 0) == 0 }
}

/// Writes a file; says when that is done.
fn write_in_background(mounted: &Mounted, name: &str) -> Receiver<Instant> {
    let (done, when) = channel();
    let file = mounted.at("a b").join(name);
    std::thread::spawn(move || {
        std::fs::write(file, "x").unwrap();
        let _ = done.send(Instant::now());
    });
    when
}

/// The helper: obeys lines on stdin.
struct Helper {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<std::process::ChildStdout>,
}

impl Helper {
    fn start(mounted: &Mounted) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper", "--nocapture", "--ignored"])
            .env(HELPER, mounted.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { process, orders, answers }
    }

    /// The answer after "=".
    fn ask(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the helper ended");
            if let Some((_, answer)) = line.split_once('=') {
                return answer.trim().into();
            }
        }
    }

    fn child_pid(&self) -> String {
        let id = self.process.id();
        let path = format!("/proc/{id}/task/{id}/children");
        // The freezer is forked by a thread of the test harness.
        let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap();
        let children = tasks
            .map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).unwrap());
        let pid = children.collect::<String>().trim().to_string();
        assert!(!pid.is_empty(), "{path} names no child");
        pid
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Not a test: the process that freezes.
#[test]
#[ignore = "started by the other tests"]
fn helper() {
    let Some(folder) = std::env::var_os(HELPER).map(PathBuf::from) else { return };
    let mounts = [folder.join("a b"), folder.join("again")];
    let mut freezer = Freezer::start(&folder.join("note")).unwrap();
    for order in std::io::stdin().lines() {
        let order = order.unwrap();
        let answer = match order.split_once(' ') {
            Some(("freeze", millis)) => {
                let limit = Duration::from_millis(millis.parse().unwrap());
                freezer.freeze(&mounts, limit).map_or_else(|e| e.to_string(), |()| "frozen".into())
            }
            _ => {
                let (frozen, intact) = freezer.thaw().unwrap();
                format!("{} {intact}", frozen.as_millis())
            }
        };
        println!("={answer}");
    }
}

#[test]
fn a_writer_waits_until_the_thaw() {
    let mounted = Mounted::new();
    let device = Device::open(&mounted.disk.path).unwrap();
    let mounts = device.mounts().unwrap();
    assert_eq!(mounts.len(), 1, "mounted twice, frozen once: {mounts:?}");
    assert_eq!((mounts[0].kind.as_str(), mounts[0].freezable), ("ext4", true));
    assert_eq!(mounts[0].path, mounted.at("a b"));
    sync_file_system(&mounts[0].path).unwrap();

    let mut helper = Helper::start(&mounted);
    assert_eq!(helper.ask("freeze 500"), "frozen");
    let note = std::fs::read(mounted.at("note").join("frozen")).unwrap();
    assert!(note.windows(3).any(|bytes| bytes == b"a b"), "nothing is noted");
    let written = write_in_background(&mounted, "one");
    let waited = written.recv_timeout(Duration::from_millis(100));
    assert_eq!(waited, Err(RecvTimeoutError::Timeout), "written while frozen");
    let thawed = helper.ask("thaw");
    written.recv_timeout(SOON).unwrap();
    let (millis, intact) = thawed.split_once(' ').unwrap();
    assert_eq!(intact, "true");
    assert!((100..500).contains(&millis.parse::<u64>().unwrap()), "{millis} ms");
    assert!(!mounted.at("note").join("frozen").exists());

    // Too long: it thaws by itself, and says so.
    let start = Instant::now();
    assert_eq!(helper.ask("freeze 150"), "frozen");
    let written = write_in_background(&mounted, "two");
    let when = written.recv_timeout(SOON).unwrap() - start;
    assert!((Duration::from_millis(140)..Duration::from_secs(1)).contains(&when), "{when:?}");
    assert!(helper.ask("thaw").ends_with("false"));
    // And again, as if nothing had been.
    assert_eq!(helper.ask("freeze 500"), "frozen");
    assert!(helper.ask("thaw").ends_with("true"));
}

#[test]
fn a_dead_parent_is_thawed_by_the_child() {
    let mounted = Mounted::new();
    let mut helper = Helper::start(&mounted);
    assert_eq!(helper.ask("freeze 500"), "frozen");
    let written = write_in_background(&mounted, "one");
    let start = Instant::now();
    helper.kill();
    let when = written.recv_timeout(SOON).unwrap() - start;
    assert!(when < Duration::from_millis(250), "only by its time: {when:?}");
}

#[test]
fn a_dead_child_is_thawed_by_the_parent() {
    let mounted = Mounted::new();
    let mut helper = Helper::start(&mounted);
    assert_eq!(helper.ask("freeze 500"), "frozen");
    let written = write_in_background(&mounted, "one");
    run("kill", &["-9", &helper.child_pid()]);
    written.recv_timeout(SOON).unwrap();
    assert!(helper.ask("thaw").ends_with("false"));
    assert!(helper.ask("freeze 500").contains("gone"));
}

#[test]
fn what_both_left_frozen_is_thawed_by_the_next_start() {
    let mounted = Mounted::new();
    let mut helper = Helper::start(&mounted);
    assert_eq!(helper.ask("freeze 500"), "frozen");
    // Both at once: stopped first, so that neither can thaw for the other.
    let child = helper.child_pid();
    run("kill", &["-STOP", &child]);
    helper.kill();
    run("kill", &["-9", &child]);
    let written = write_in_background(&mounted, "one");
    let waited = written.recv_timeout(Duration::from_millis(700));
    assert_eq!(waited, Err(RecvTimeoutError::Timeout), "somebody has thawed it");
    let mut next = Helper::start(&mounted);
    written.recv_timeout(SOON).unwrap();
    assert_eq!(next.ask("freeze 500"), "frozen");
    assert!(next.ask("thaw").ends_with("true"));
}

#[test]
fn what_others_froze_stays_frozen() {
    let mounted = Mounted::new();
    let mut helper = Helper::start(&mounted);
    run("fsfreeze", &["-f", mounted.at("a b").to_str().unwrap()]);
    let answer = helper.ask("freeze 500");
    assert!(answer.contains("busy"), "{answer}");
    assert!(!mounted.at("note").join("frozen").exists());
    let written = write_in_background(&mounted, "one");
    let waited = written.recv_timeout(Duration::from_millis(100));
    assert_eq!(waited, Err(RecvTimeoutError::Timeout), "thawed what it had not frozen");
    assert!(thaw_by_hand(&mounted.at("a b")));
    written.recv_timeout(SOON).unwrap();
}
