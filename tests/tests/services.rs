//! Daemons as init sees them: readiness, a watchdog that only a hanging loop stops, a clean end; and
//! their metrics, compared with what docs/metrics.md says, both ways.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secondsite_tests::faulty::slow_device;
use secondsite_tests::lab::{Daemon, Lab, SERVER, Side};
use secondsite_tests::threads::{Held, named, system_call};
use secondsite_tests::wait_until;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// What init would ask for; a loop may hang for half of it.
const WATCHDOG: Duration = Duration::from_secs(2);
/// Long enough for init to have killed a daemon that was not fed.
const OBSERVED: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(60);
const VOLUME_BYTES: u64 = 32 << 20;

/// Init's end of a daemon's socket.
struct Init(UnixDatagram);

impl Init {
    fn start(lab: &mut Lab, daemon: Daemon) -> Self {
        let path = lab.path(&format!("notify-{daemon:?}"));
        let socket = UnixDatagram::bind(&path).unwrap();
        let limit = WATCHDOG.as_micros().to_string();
        let environment = [("NOTIFY_SOCKET", path.as_os_str()), ("WATCHDOG_USEC", limit.as_ref())];
        lab.start_with(daemon, &environment);
        let init = Self(socket);
        init.told("READY=1", LIMIT);
        init
    }

    /// The next line within `limit`; none if there is none.
    fn hear(&self, limit: Duration) -> Option<String> {
        let mut buffer = [0; 4096];
        self.0.set_read_timeout(Some(limit.max(Duration::from_millis(1)))).unwrap();
        let count = self.0.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..count]).into_owned())
    }

    fn told(&self, line: &str, limit: Duration) {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let text = self.hear(end - Instant::now()).unwrap_or_default();
            if text.lines().any(|found| found == line) {
                return;
            }
        }
        panic!("init was not told {line} within {limit:?}");
    }

    /// The longest time without food from now on, over [`OBSERVED`].
    fn hungry(&self) -> Duration {
        while self.hear(Duration::ZERO).is_some() {}
        let begun = Instant::now();
        let (mut fed, mut longest) = (begun, Duration::ZERO);
        while begun.elapsed() < OBSERVED {
            let text = self.hear(OBSERVED.saturating_sub(begun.elapsed())).unwrap_or_default();
            if text.lines().any(|line| line == "WATCHDOG=1") {
                longest = longest.max(fed.elapsed());
                fed = Instant::now();
            }
        }
        longest.max(fed.elapsed())
    }

    fn is_fed(&self, while_: &str) {
        let hungry = self.hungry();
        println!("{while_}: fed, at the longest after {hungry:?}");
        assert!(hungry < WATCHDOG, "{while_}: init would have killed it, {hungry:?} without food");
    }

    /// A hanging loop is noticed within half the limit; from then on nothing may come.
    fn starves(&self, while_: &str) {
        wait_until(&format!("{while_}: init is told no more"), LIMIT, || {
            let hungry = self.hungry();
            (hungry > WATCHDOG).then_some(()).ok_or_else(|| format!("fed after {hungry:?}"))
        });
        println!("{while_}: not fed");
    }
}

/// A process held still; goes on when dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(process: Pid) -> Self {
        kill(process, Signal::SIGSTOP).unwrap();
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Waits until a thread of the agent that ships waits in one of these system calls.
fn wait_for_call(agent: Pid, calls: &[i64]) {
    wait_until("the shipper waits for the outside", LIMIT, || {
        let shippers = named(agent, "ship ");
        let found: Vec<_> = shippers.iter().map(|thread| system_call(agent, *thread)).collect();
        let waits = found.iter().flatten().any(|call| calls.contains(call));
        waits.then_some(()).ok_or_else(|| format!("system calls {found:?}"))
    });
}

fn get(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer within 5 s");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    body.to_owned()
}

/// A strict reader of the part of OpenMetrics that is used. Gives type and label names by the name
/// of a sample's metric.
fn parse(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let body = text.strip_suffix("# EOF\n").expect("it ends with # EOF and nothing after");
    let (mut families, mut found) = (BTreeMap::new(), BTreeMap::new());
    let (mut current, mut series) = (String::new(), BTreeSet::new());
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect(line);
            assert!(!help.is_empty() && !families.contains_key(name), "{line}");
            current = name.to_owned();
            families.insert(current.clone(), String::new());
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect(line);
            assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
            assert_eq!(name, current, "a type follows its help");
            families.insert(name.to_owned(), kind.to_owned());
            continue;
        }
        let (name_and_labels, value) = line.rsplit_once(' ').expect(line);
        assert!(series.insert(name_and_labels.to_owned()), "twice: {line}");
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
        let (name, labels) = match name_and_labels.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect(line)),
            None => (name_and_labels, ""),
        };
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(name.starts_with("secondsite_") && name.chars().all(plain), "{line}");
        let suffix =
            name.strip_prefix(current.as_str()).unwrap_or_else(|| panic!("strays: {line}"));
        let kind = families[&current].as_str();
        let suffixes: &[&str] = match kind {
            "gauge" => &[""],
            "counter" => &["_total"],
            _ => &["_sum", "_count", "_bucket"],
        };
        assert!(suffixes.contains(&suffix), "{kind}: {line}");
        assert!(kind == "gauge" || value >= 0.0, "{line}");
        let names = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
            let (name, value) = label.split_once('=').expect(line);
            assert!(value.len() >= 2 && value.starts_with('"') && value.ends_with('"'), "{line}");
            name.to_owned()
        });
        let names: BTreeSet<String> = names.filter(|name| name != "le").collect();
        let name = if kind == "counter" { name.to_owned() } else { current.clone() };
        let seen = found.entry(name).or_insert_with(|| (kind.to_owned(), names.clone()));
        assert_eq!(seen.1, names, "the same labels in every row: {line}");
    }
    found
}

/// The table of docs/metrics.md.
fn documented() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/metrics.md");
    let text = std::fs::read_to_string(file).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `secondsite_"));
    rows.map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let labels = cells[3].split(", ").filter(|label| !label.is_empty());
        let labels = labels.map(str::to_owned).collect();
        (cells[1].trim_matches('`').to_owned(), (cells[2].to_owned(), labels))
    })
    .collect()
}

#[test]
fn init_is_told_the_truth_and_metrics_are_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let slow = slow_device(dir.path(), VOLUME_BYTES, Duration::ZERO);
    let mut lab = Lab::new();
    lab.stop(Daemon::Target);
    lab.stop(Daemon::Control);
    let control = Init::start(&mut lab, Daemon::Control);
    let target = Init::start(&mut lab, Daemon::Target);
    lab.try_join(&lab.token(), SERVER).ok();
    let agent = Init::start(&mut lab, Daemon::Replicate);
    lab.protect(slow.path(), &["--rpo", "3s"]).ok();
    lab.wait_for_epoch_after(1, LIMIT);
    lab.wait_until_promoted(LIMIT);
    let socket = |daemon| match daemon {
        Daemon::Control => lab.config_dir(Side::Site).join("run/control.metrics"),
        Daemon::Target => lab.config_dir(Side::Site).join("run/target.metrics"),
        Daemon::Replicate => lab.config_dir(Side::Server).join("run/agent.metrics"),
    };
    let all = [Daemon::Control, Daemon::Target, Daemon::Replicate];

    // Metrics: all that is exposed is documented, with type and labels, and the other way round.
    let exposed: BTreeMap<_, _> =
        all.iter().flat_map(|daemon| parse(&get(&socket(*daemon)))).collect();
    let documented = documented();
    for (name, what) in &exposed {
        assert_eq!(Some(what), documented.get(name), "{name}: exposed, and documented");
    }
    for name in documented.keys() {
        assert!(exposed.contains_key(name), "{name} is documented and not exposed");
    }
    println!("{} metrics as documented", exposed.len());

    // What is outside may take its time. A verify reads the disk and asks the target.
    let agent_pid = lab.pid(Daemon::Replicate);
    let outside = |still: Pid, calls: &[i64], what: &str| {
        std::thread::scope(|scope| {
            let still = Stopped::new(still);
            let verify = scope.spawn(|| lab.cli(Side::Site, &["verify", SERVER]));
            wait_for_call(agent_pid, calls);
            agent.is_fed(what);
            get(&socket(Daemon::Replicate));
            drop(still);
            verify.join().unwrap().ok();
        });
    };
    let reads = [libc::SYS_io_uring_enter, libc::SYS_openat];
    outside(slow.medium(), &reads, "the agent, its disk standing still");
    let listens = [libc::SYS_recvfrom, libc::SYS_read];
    outside(lab.pid(Daemon::Target), &listens, "the agent, its target standing still");
    {
        let _still = Stopped::new(agent_pid);
        std::thread::scope(|scope| {
            scope.spawn(|| target.is_fed("the target, its agent standing still"));
            scope.spawn(|| control.is_fed("control, the agent standing still"));
        });
    }

    // A loop that hangs starves init, until it goes on.
    let starve = |hanging: &[(&Init, Daemon, &str)]| {
        let hold =
            |(_, daemon, thread): &(_, Daemon, &str)| Held::new(named(lab.pid(*daemon), thread));
        // Traced by this thread, which waits while others listen.
        let held: Vec<Held> = hanging.iter().map(hold).collect();
        std::thread::scope(|scope| {
            for (init, daemon, thread) in hanging {
                scope.spawn(move || init.starves(&format!("{daemon:?}, {thread:?} hanging")));
            }
        });
        drop(held);
        hanging.iter().for_each(|(init, ..)| init.told("WATCHDOG=1", LIMIT));
    };
    starve(&[
        (&agent, Daemon::Replicate, "coordinator"),
        (&target, Daemon::Target, "listen"),
        (&control, Daemon::Control, "tokio"),
    ]);
    starve(&[(&agent, Daemon::Replicate, "ship ")]);

    for (init, daemon) in
        [(&agent, Daemon::Replicate), (&target, Daemon::Target), (&control, Daemon::Control)]
    {
        // Init reads all the time; its queue is short, and who finds it full waits.
        while init.hear(Duration::ZERO).is_some() {}
        let begun = Instant::now();
        lab.stop(daemon);
        assert!(begun.elapsed() < Duration::from_secs(10), "{daemon:?}: {:?}", begun.elapsed());
        init.told("STOPPING=1", LIMIT);
    }
}
