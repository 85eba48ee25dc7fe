//! First copy and delta of a volume, beside what an administrator would type instead.
//!
//! All contenders read the same loop device (directly, as Secondsite does) and end with a durable
//! copy in the same folder; they take turns, so that drift of the machine hits all of them alike.

use crate::data::{self, Kind};
use crate::deployment::{Deployment, cost};
use anyhow::{Context, Result, ensure};
use clap::Args;
use secondsite_tests::block::LoopDevice;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Size of the volume, MiB.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// What it holds.
    #[arg(long, value_enum, default_value_t = Kind::Half)]
    data: Kind,
    /// Share of its blocks that is rewritten for the delta, percent.
    #[arg(long, default_value_t = 1.0)]
    dirty: f64,
    /// The rewritten blocks lie side by side instead of scattered.
    #[arg(long)]
    clustered: bool,
    /// Rounds of turns; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only Secondsite, without the others.
    #[arg(long)]
    alone: bool,
    /// Where volume and copies lie; twice the volume's size must be free.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

/// The rows that are measured.
const CP: &str = "dd, one process, durable (as cp)";
const PIPE: &str = "dd | lz4 -1 | nc | lz4 -d | dd";
const NBDCOPY: &str = "nbdkit file | nbdcopy --flush";
const FIRST_COPY: &str = "secondsite, first copy";
const DELTA: &str = "secondsite, delta";

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    seconds: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Document {
    schema_version: u32,
    volume_bytes: u64,
    data: String,
    dirty_bytes: u64,
    rows: Vec<Row>,
    /// Of one first copy and one delta.
    sent_bytes: u64,
    delta_sent_bytes: u64,
    agent_cpu_seconds: f64,
    target_cpu_seconds: f64,
    agent_resident_bytes_max: u64,
    target_resident_bytes_max: u64,
}

/// Runs it.
pub fn measure(options: &Options) -> Result<()> {
    ensure!(options.rounds > 0 && options.mib >= 64, "--rounds at least 1, --mib at least 64");
    ensure!((0.0..=100.0).contains(&options.dirty), "--dirty is a percentage");
    let folder = tempfile::Builder::new().prefix("secondsite-bench-").tempdir_in(&options.dir)?;
    let bytes = options.mib << 20;
    let device = LoopDevice::sparse(folder.path(), "volume", bytes);
    let file = OpenOptions::new().read(true).write(true).open(device.path())?;
    data::fill(&file, options.data, bytes)?;
    let blocks = (bytes as f64 / 4096.0 * options.dirty / 100.0) as u64;
    let mut document = Document {
        schema_version: 1,
        volume_bytes: bytes,
        data: format!("{:?}", options.data).to_lowercase(),
        dirty_bytes: blocks * 4096,
        rows: [CP, PIPE, NBDCOPY, FIRST_COPY, DELTA].map(row).into(),
        sent_bytes: 0,
        delta_sent_bytes: 0,
        agent_cpu_seconds: 0.0,
        target_cpu_seconds: 0.0,
        agent_resident_bytes_max: 0,
        target_resident_bytes_max: 0,
    };
    for round in 0..options.rounds {
        let copy = folder.path().join("copy");
        if !options.alone {
            for (index, script) in [(0, cp()), (1, pipe()), (2, nbdcopy())] {
                let seconds = shell(&script, device.path(), &copy, folder.path())?;
                document.rows[index].seconds.push(seconds);
                std::fs::remove_file(&copy)?;
                settle(folder.path())?;
            }
        }
        own_round(&mut document, folder.path(), &device, &file, blocks, options, round)?;
        settle(folder.path())?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        print(&document);
    }
    Ok(())
}

fn row(name: &'static str) -> Row {
    Row { name, seconds: Vec::new() }
}

/// What one contender left to write back is not the next one's.
fn settle(folder: &Path) -> Result<()> {
    Ok(nix::unistd::syncfs(File::open(folder)?)?)
}

fn own_round(
    document: &mut Document,
    folder: &Path,
    device: &LoopDevice,
    file: &File,
    blocks: u64,
    options: &Options,
    round: usize,
) -> Result<()> {
    let bytes = document.volume_bytes;
    let site = folder.join("site");
    let before = cost("self")?;
    let begun = Instant::now();
    let mut deployment = Deployment::start(&site, device.path(), bytes)?;
    deployment.copied()?;
    document.rows[3].seconds.push(begun.elapsed().as_secs_f64());
    let (agent, target) = (cost("self")?, deployment.target_cost()?);
    document.sent_bytes = deployment.report()?.sent_bytes;
    document.agent_cpu_seconds = agent.cpu_seconds - before.cpu_seconds;
    document.target_cpu_seconds = target.cpu_seconds;
    // The first point, which is not the delta's.
    deployment.cut()?;
    data::dirty(file, bytes, blocks, !options.clustered, round as u64 + 2)?;
    let sent = deployment.report()?.sent_bytes;
    let begun = Instant::now();
    deployment.cut()?;
    document.rows[4].seconds.push(begun.elapsed().as_secs_f64());
    document.delta_sent_bytes = deployment.report()?.sent_bytes - sent;
    document.agent_resident_bytes_max = cost("self")?.resident_bytes_max;
    document.target_resident_bytes_max = deployment.target_cost()?.resident_bytes_max;
    drop(deployment);
    std::fs::remove_dir_all(site)?;
    Ok(())
}

fn cp() -> String {
    "dd if=\"$1\" of=\"$2\" bs=1M iflag=direct conv=fdatasync status=none".into()
}

fn pipe() -> String {
    "nc -l -N 127.0.0.1 \"$4\" </dev/null | lz4 -q -d | dd of=\"$2\" bs=1M iflag=fullblock conv=fdatasync status=none &
     until ss -Hltn \"sport = :$4\" | grep -q .; do sleep 0.01; done
     dd if=\"$1\" bs=1M iflag=direct status=none | lz4 -q -1 | nc -N 127.0.0.1 \"$4\"
     wait"
        .into()
}

fn nbdcopy() -> String {
    "nbdkit --exit-with-parent -U \"$3/nbd.sock\" -P \"$3/nbd.pid\" -f file \"$1\" &
     until [ -S \"$3/nbd.sock\" ] && [ -s \"$3/nbd.pid\" ]; do sleep 0.01; done
     truncate -s \"$(blockdev --getsize64 \"$1\")\" \"$2\"
     nbdcopy --flush \"nbd+unix:///?socket=$3/nbd.sock\" \"$2\"
     kill \"$(cat \"$3/nbd.pid\")\"; wait; rm -f \"$3/nbd.sock\" \"$3/nbd.pid\""
        .into()
}

fn shell(script: &str, device: &Path, copy: &Path, folder: &Path) -> Result<f64> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let begun = Instant::now();
    let output = Command::new("bash")
        .args(["-c", script, "bench"])
        .args([device, copy, folder])
        .arg(port.to_string())
        .output()
        .context("bash")?;
    let seconds = begun.elapsed().as_secs_f64();
    let copied = std::fs::metadata(copy).map(|meta| meta.len()).unwrap_or(0);
    let whole = File::open(device)
        .and_then(|mut d| std::io::Seek::seek(&mut d, std::io::SeekFrom::End(0)))?;
    ensure!(
        copied == whole,
        "{copied} of {whole} bytes were copied by: {script}\n{} (needs the packages lz4, netcat-openbsd, iproute2, nbdkit, libnbd-bin; --alone leaves them out)",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(seconds)
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(document: &Document) {
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    let volume = mib(document.volume_bytes);
    println!("{volume:.0} MiB of {}, delta of {:.0} MiB", document.data, mib(document.dirty_bytes));
    let first = &document.rows[3];
    for row in document.rows.iter().filter(|row| !row.seconds.is_empty()) {
        let ratios: Vec<f64> =
            first.seconds.iter().zip(&row.seconds).map(|(ours, theirs)| ours / theirs).collect();
        let seconds = median(&row.seconds);
        let all: Vec<String> = row.seconds.iter().map(|s| format!("{s:.2}")).collect();
        println!(
            "  {:<36} {seconds:>8.3} s  {:>8.1} MiB/s   first copy / this {:>7.2}x   [{}]",
            row.name,
            volume / seconds,
            median(&ratios),
            all.join(" ")
        );
    }
    println!(
        "  sent: first copy {:.1} MiB, delta {:.1} MiB\n  processor: agent {:.2} s, target {:.2} s of the first copy\n  resident at most: agent {:.1} MiB, target {:.1} MiB",
        mib(document.sent_bytes),
        mib(document.delta_sent_bytes),
        document.agent_cpu_seconds,
        document.target_cpu_seconds,
        mib(document.agent_resident_bytes_max),
        mib(document.target_resident_bytes_max)
    );
}
