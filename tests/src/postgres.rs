//! PostgreSQL for a test: a cluster made with `initdb` in a folder of the test's, run as user
//! postgres, reached through a socket of its own, and ended with the value.

use crate::block::run;
use crate::daemon::Child;
use crate::wait_until;
use nix::sys::signal::{Signal, kill};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::Duration;

/// Small, so that a small volume does: what the write-ahead log may take is bounded.
const SETTINGS: [&str; 6] = [
    "listen_addresses=",
    "max_wal_size=48MB",
    "min_wal_size=8MB",
    "shared_buffers=16MB",
    "checkpoint_timeout=30s",
    "autovacuum_naptime=5s",
];
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A running cluster.
pub struct Postgres {
    child: Option<Child>,
    data: PathBuf,
    socket: PathBuf,
}

impl Postgres {
    /// Makes a cluster with checksums in `data`, a folder that does not exist yet.
    pub fn init(data: &Path) {
        std::fs::create_dir(data).expect("a folder for the cluster");
        give_away(data);
        let options = ["--data-checksums", "--wal-segsize=4", "--auth=trust", "--no-locale"];
        tool("initdb", |command| command.args(options).arg("--pgdata").arg(data));
    }

    /// Starts the cluster in `data` and waits until it answers; its socket lies in the new folder
    /// `socket`.
    pub fn start(data: &Path, socket: &Path) -> Self {
        std::fs::create_dir_all(socket).expect("a folder for the socket");
        give_away(socket);
        let mut command = program("postgres");
        command.arg("-D").arg(data).arg("-k").arg(socket);
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        let child = Some(Child::spawn("postgres", &mut command));
        let mut postgres = Self { child, data: data.to_owned(), socket: socket.to_owned() };
        wait_until("PostgreSQL answers", START_LIMIT, || {
            let child = postgres.child.as_mut().expect("it was started");
            if let Some(status) = child.ended() {
                panic!("PostgreSQL ended: {status}\n{}", child.log());
            }
            let ready = program("pg_isready").arg("-q").arg("-h").arg(socket).status();
            let ready = ready.expect("pg_isready runs").success();
            if ready { Ok(()) } else { Err(child.log()) }
        });
        postgres
    }

    /// What it printed.
    pub fn log(&self) -> String {
        self.child.as_ref().expect("it runs").whole_log()
    }

    /// Runs SQL; returns its rows as text, fields separated by `|`.
    pub fn sql(&self, text: &str) -> String {
        tool("psql", |command| {
            self.reach(command).args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-c", text])
        })
    }

    /// Runs one of PostgreSQL's programs on its database.
    pub fn tool(&self, name: &str, arguments: &[&str]) -> String {
        tool(name, |command| self.reach(command).args(arguments))
    }

    /// Starts one.
    pub fn spawn(&self, name: &str, arguments: &[&str]) -> Child {
        let mut command = program(name);
        self.reach(&mut command).args(arguments);
        Child::spawn(name, &mut command)
    }

    /// A connection for one statement after the other.
    pub fn connect(&self) -> Connection {
        let mut command = program("psql");
        self.reach(&mut command).args(["-XqAt", "-v", "ON_ERROR_STOP=1"]);
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("psql runs");
        let input = process.stdin.take();
        let output = BufReader::new(process.stdout.take().expect("its output is a pipe"));
        Connection { process, input, output }
    }

    fn reach<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let of_postgres = [("PGUSER", "postgres"), ("PGDATABASE", "postgres")];
        command.env("PGHOST", &self.socket).envs(of_postgres)
    }

    /// Stops it cleanly, and checks every block's checksum.
    pub fn stop_and_check(mut self) {
        self.end(Signal::SIGINT);
        let data = self.data.clone();
        tool("pg_checksums", |command| command.arg("--check").arg("--pgdata").arg(&data));
    }

    fn end(&mut self, signal: Signal) {
        let Some(mut child) = self.child.take() else { return };
        if kill(child.pid(), signal).is_ok() {
            // Never a panic here: it also runs while one is passed on. If it does not end, it is
            // killed with the value.
            let end = std::time::Instant::now() + STOP_LIMIT;
            while child.ended().is_none() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Its processes end with it, at once.
        self.end(Signal::SIGQUIT);
    }
}

/// See [`Postgres::connect`].
pub struct Connection {
    process: std::process::Child,
    input: Option<ChildStdin>,
    output: BufReader<std::process::ChildStdout>,
}

impl Connection {
    /// Runs a statement that returns one row, and waits for it; none if the connection ended.
    /// The row is sent when the statement is committed.
    pub fn ask(&mut self, statement: &str) -> Option<String> {
        let input = self.input.as_mut()?;
        writeln!(input, "{statement}").and_then(|()| input.flush()).ok()?;
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(bytes) if bytes > 0 => Some(line.trim().to_owned()),
            _ => None,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a program to its end; it must succeed.
fn tool(name: &str, with: impl FnOnce(&mut Command) -> &mut Command) -> String {
    let mut command = program(name);
    let output = with(&mut command).stdin(Stdio::null()).output().expect("it runs");
    let talk = String::from_utf8_lossy(&output.stderr);
    let data = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{command:?}: {talk}{data}");
    data.trim().to_owned()
}

/// One of PostgreSQL's programs, to be run as user postgres.
fn program(name: &str) -> Command {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("postgresql is installed");
    let folders = versions.flatten().map(|entry| entry.path().join("bin").join(name));
    let path = folders.filter(|path| path.exists()).max();
    let mut command = Command::new(path.unwrap_or_else(|| panic!("no {name} is installed")));
    let id = |option| run("id", &[option, "postgres"]).parse().expect("a number");
    command.uid(id("-u")).gid(id("-g")).current_dir("/");
    command
}

fn give_away(path: &Path) {
    run("chown", &["postgres:postgres", path.to_str().expect("UTF-8")]);
    run("chmod", &["0700", path.to_str().expect("UTF-8")]);
}
