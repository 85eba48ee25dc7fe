//! The index of a long history: its size on disk and in memory, opening it, looking into it. It is
//! looked at by a process of its own, so that making it does not show in the memory.

use super::play::{self, BLOCK_BYTES, Source};
use super::{Row, percentiles};
use crate::data::{Kind, Random};
use anyhow::{Context, Result, ensure};
use secondsite::target::layers::overlay;
use secondsite_format::ids::Epoch;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const VOLUME_BYTES: u64 = 1 << 40;
/// Of an extent: the smallest there is, so that ten million are not forty gigabytes.
const EXTENT_BYTES: u64 = 512;
const FRAME_EXTENTS: u64 = 2048;
const EPOCH_EXTENTS: u64 = 16 * FRAME_EXTENTS;
const LOOKUPS: u64 = 5000;

pub fn measure(folder: &Path, extents: u64) -> Result<Vec<Row>> {
    let (mut source, keeper) = Source::begin(folder, VOLUME_BYTES, None)?;
    let mut random = Random::seeded(2);
    let epochs = extents / EPOCH_EXTENTS;
    for epoch in 1..=epochs {
        let mut contents = Vec::new();
        let step = VOLUME_BYTES / EPOCH_EXTENTS;
        for first in (0..EPOCH_EXTENTS).step_by(FRAME_EXTENTS as usize) {
            let places = (first..first + FRAME_EXTENTS).map(|i| {
                let within = random.next() % (step / BLOCK_BYTES) * BLOCK_BYTES;
                (i * step + within, EXTENT_BYTES)
            });
            let places: Vec<(u64, u64)> = places.collect();
            contents.push(play::content(&places, Kind::Text, &mut random)?);
        }
        play::receive(&keeper, &source.epoch(&contents)?)?;
        play::gather(&keeper, &play::epochs(epoch), epoch == epochs)?;
    }
    drop(keeper);
    play::evict(&source.volume_folder())?;
    let looked = Command::new(std::env::current_exe()?).arg("look-into").arg(folder).output()?;
    ensure!(looked.status.success(), "looking: {}", String::from_utf8_lossy(&looked.stderr));
    Ok(serde_json::from_slice(&looked.stdout)?)
}

fn resident_bytes() -> Result<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = statm.split_whitespace().nth(1).context("statm")?.parse()?;
    Ok(pages * 4096.0)
}

/// The other process.
pub fn look_into(folder: &Path) -> Result<()> {
    let before = resident_bytes()?;
    let begun = Instant::now();
    let keeper = play::open(folder, VOLUME_BYTES)?;
    let seconds = begun.elapsed().as_secs_f64();
    let added = resident_bytes()? - before;
    let runs = keeper.volume().runs().to_vec();
    let pieces: u64 = runs.iter().map(|run| run.pieces).sum();
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder.join("volume/history"))? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "run") {
            bytes += entry.metadata()?.len();
        }
    }
    let upto = runs.last().context("a run")?.to;
    let layers = keeper.volume().layers();
    let mut random = Random::seeded(3);
    let mut lookup = || -> Result<Vec<f64>> {
        let mut seconds = Vec::new();
        for _ in 0..LOOKUPS {
            let at = random.next() % (VOLUME_BYTES / BLOCK_BYTES) * BLOCK_BYTES;
            let begun = Instant::now();
            std::hint::black_box(overlay(&layers, at, at + BLOCK_BYTES, Epoch(upto.0 / 2))?);
            seconds.push(begun.elapsed().as_secs_f64());
        }
        Ok(seconds)
    };
    let cold = lookup()?;
    let warm = lookup()?;
    let mut rows = vec![
        Row::new("extents", pieces as f64, ""),
        Row::new("runs", runs.len() as f64, ""),
        Row::goal("on disk, an extent", bytes as f64 / pieces as f64, "B", 40.0),
        Row::goal("opening, cold", seconds, "s", 1.0),
        Row::goal("memory", added / f64::from(1 << 20), "MiB", 64.0),
        Row::new(
            "memory after the lookups",
            (resident_bytes()? - before) / f64::from(1 << 20),
            "MiB",
        ),
    ];
    rows.extend(percentiles("looking up 4 KiB, at first", cold, None));
    rows.extend(percentiles("looking up 4 KiB, again", warm, None));
    println!("{}", serde_json::to_string(&rows)?);
    Ok(())
}
