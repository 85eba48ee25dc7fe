//! Reads from an opened point, beside qemu-nbd and nbdkit that serve the same bytes from a raw
//! file, in turns. fio is the client of all.

use super::Row;
use super::play::{self, BLOCK_BYTES, Source};
use crate::data::{Kind, Random};
use anyhow::{Context, Result, ensure};
use secondsite::nbd::{Device, Server};
use secondsite::overlay::Overlay;
use secondsite::target::keeper::Keeper;
use secondsite::target::point::PointDevice;
use secondsite::target::unpacked::Unpacked;
use secondsite_format::ids::Epoch;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where the bytes of a point lie.
#[derive(Clone, Copy)]
enum Lies {
    Replica,
    /// Written in one go.
    Journal,
    /// Written here and there: neighbours lie in different epochs.
    Scattered,
}

const JOBS: [(&str, &[&str]); 3] = [
    ("1 MiB in order", &["--rw=read", "--bs=1m", "--iodepth=4"]),
    ("4 KiB at random, depth 1", &["--rw=randread", "--bs=4k", "--iodepth=1"]),
    ("4 KiB at random, depth 32", &["--rw=randread", "--bs=4k", "--iodepth=32"]),
];
const SERVERS: [&str; 3] = ["secondsite", "qemu-nbd", "nbdkit"];

pub fn measure(folder: &Path, mib: u64, rounds: usize, runtime: Duration) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, lies) in [
        ("in the replica", Lies::Replica),
        ("in the journal", Lies::Journal),
        ("scattered over 16 epochs", Lies::Scattered),
    ] {
        let folder = folder.join(format!("{lies}", lies = lies as u8));
        std::fs::create_dir(&folder)?;
        let keeper = make(&folder, mib << 20, lies)?;
        let servers = Servers::start(&folder, &keeper)?;
        for (job, options) in JOBS {
            let mut rates = [const { Vec::new() }; SERVERS.len()];
            // What comes from the journal is unpacked when it is read first; after that is counted.
            let first = fio(&folder.join(SERVERS[0]), options, runtime * 2, mib)?;
            for _ in 0..rounds {
                for (server, rates) in SERVERS.iter().zip(&mut rates) {
                    rates.push(fio(&folder.join(server), options, runtime, mib)?);
                }
            }
            let of = |ours: &[f64], theirs: &[f64]| {
                super::median(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect())
            };
            let name = format!("{name}, {job}");
            let (scale, unit) =
                if job.starts_with('1') { (1.0, "MiB/s") } else { (256.0, "reads/s") };
            rows.push(Row::new(&name, super::median(rates[0].clone()) * scale, unit));
            rows.push(Row::new("  in the seconds before", first * scale, unit));
            rows.push(Row::at_least("  to qemu-nbd", of(&rates[0], &rates[1]), "x", 0.8));
            rows.push(Row::at_least("  to nbdkit", of(&rates[0], &rates[2]), "x", 0.8));
        }
        servers.compare(&folder.join("raw"))?;
        drop(servers);
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(rows)
}

fn make(folder: &Path, bytes: u64, lies: Lies) -> Result<Keeper> {
    let fill = matches!(lies, Lies::Replica).then_some(Kind::Half);
    let (mut source, keeper) = Source::begin(folder, bytes, fill)?;
    let mut random = Random::seeded(5);
    let blocks = bytes / BLOCK_BYTES;
    let owner: Vec<u8> = (0..blocks).map(|_| (random.next() >> 40) as u8 % 16).collect();
    for epoch in 0..16 {
        let numbers: Vec<u64> = match lies {
            Lies::Replica => (0..blocks).filter(|_| random.next() >> 54 == 0).collect(),
            Lies::Journal => (blocks * epoch / 16..blocks * (epoch + 1) / 16).collect(),
            Lies::Scattered => (0..blocks).filter(|i| owner[*i as usize] == epoch as u8).collect(),
        };
        let contents = play::blocks(&numbers, Kind::Half, &mut random)?;
        play::receive(&keeper, &source.epoch(&contents)?)?;
    }
    play::gather(&keeper, &play::epochs(16), true)?;
    Ok(keeper)
}

struct Servers {
    own: Server,
    point: Arc<Overlay>,
    others: Vec<Child>,
}

impl Servers {
    fn start(folder: &Path, keeper: &Keeper) -> Result<Self> {
        let view = keeper.view_at(Epoch(16)).map_err(play::refused)?.context("a point")?;
        let unpacked = Unpacked::new(folder, 4 << 30)?;
        let base = Arc::new(PointDevice::with_unpacked(view, unpacked));
        let raw = folder.join("raw");
        let mut file = std::fs::File::create(&raw)?;
        let mut buffer = vec![0; 1 << 20];
        for at in (0..base.bytes()).step_by(buffer.len()) {
            base.read_at(at, &mut buffer)?;
            file.write_all(&buffer)?;
        }
        let point = Arc::new(Overlay::open(folder, base, &[0; 32], 1 << 30)?);
        let own = Server::new(None)?;
        own.listen_unix(&folder.join(SERVERS[0]))?;
        own.add("disk", point.clone())?;
        let mut servers = Self { own, point, others: Vec::new() };
        let qemu = Command::new("qemu-nbd")
            .args(["-f", "raw", "-r", "-t", "-x", "disk", "-e", "8", "--cache=writeback", "-k"])
            .arg(folder.join(SERVERS[1]))
            .arg(&raw)
            .spawn()
            .context("qemu-nbd (package qemu-utils)")?;
        servers.others.push(qemu);
        let nbdkit = Command::new("nbdkit")
            .args(["-f", "-r", "-e", "disk", "-U"])
            .arg(folder.join(SERVERS[2]))
            .arg("file")
            .arg(&raw)
            .stdin(Stdio::null())
            .spawn()
            .context("nbdkit (package nbdkit)")?;
        servers.others.push(nbdkit);
        let end = Instant::now() + Duration::from_secs(10);
        while SERVERS.iter().any(|server| !folder.join(server).exists()) {
            ensure!(Instant::now() < end, "no server listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(servers)
    }

    /// Blocks read here and there are those of the raw file, also where they were kept unpacked.
    fn compare(&self, raw: &Path) -> Result<()> {
        let raw = std::fs::File::open(raw)?;
        let mut random = Random::seeded(9);
        let (mut found, mut wanted) = ([0; BLOCK_BYTES as usize], [0; BLOCK_BYTES as usize]);
        for _ in 0..10_000 {
            let at = random.next() % (self.point.bytes() / BLOCK_BYTES) * BLOCK_BYTES;
            self.point.read_at(at, &mut found)?;
            raw.read_exact_at(&mut wanted, at)?;
            ensure!(found == wanted, "the point reads otherwise at {at}");
        }
        Ok(())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.own.stop();
        for child in &mut self.others {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// MiB a second.
fn fio(socket: &Path, options: &[&str], runtime: Duration, mib: u64) -> Result<f64> {
    let output = Command::new("fio")
        .args(["--name=read", "--ioengine=nbd", "--time_based", "--randrepeat=0"])
        .args(["--output-format=json", &format!("--size={mib}m")])
        .arg(format!("--runtime={}ms", runtime.as_millis()))
        .arg(format!("--uri=nbd+unix:///disk?socket={}", socket.display()))
        .args(options)
        .output()
        .context("fio (package fio)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let from = text
        .find('{')
        .with_context(|| format!("fio: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let document: serde_json::Value = serde_json::from_str(&text[from..])?;
    let job = &document["jobs"][0];
    ensure!(job["error"] == 0, "fio failed: {}", job["error"]);
    let bytes = job["read"]["bw_bytes"].as_f64().context("fio's bandwidth")?;
    Ok(bytes / f64::from(1 << 20))
}
