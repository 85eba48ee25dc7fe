//! Child processes that never outlive their test, with their output kept for a failure.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::process::{Command, Stdio};

/// A running child; killed and reaped when dropped.
pub struct Child {
    name: String,
    process: std::process::Child,
    output: File,
}

/// How much of a log a failure shows, bytes.
const LOG_BYTES_SHOWN: usize = 4000;

impl Child {
    /// Starts `command` without input; its output goes to an unnamed file.
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        let output = tempfile::tempfile().expect("a temporary file");
        let out = || Stdio::from(output.try_clone().expect("another descriptor"));
        let process = command
            .stdin(Stdio::null())
            .stdout(out())
            .stderr(out())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { name: name.to_owned(), process, output }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.process.try_wait().expect("wait for our own child")
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(mut self) {
        self.process.kill().expect("kill our own child");
        self.process.wait().expect("wait for our own child");
    }

    /// SIGTERM, and waits; returns its status.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        kill(self.pid(), Signal::SIGTERM).expect("signal our own child");
        self.process.wait().expect("wait for our own child")
    }

    /// The end of what it printed.
    pub fn log(&self) -> String {
        format!("--- {}\n{}", self.name, self.end_of_log(LOG_BYTES_SHOWN))
    }

    /// All that it printed.
    pub fn whole_log(&self) -> String {
        self.end_of_log(usize::MAX)
    }

    fn end_of_log(&self, bytes_max: usize) -> String {
        // The child shares this descriptor's offset: read by position, never by seeking.
        let bytes = self.output.metadata().map(|m| m.len()).unwrap_or(0) as usize;
        let start = bytes.saturating_sub(bytes_max);
        let mut text = vec![0; bytes - start];
        let _ = std::os::unix::fs::FileExt::read_exact_at(&self.output, &mut text, start as u64);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
