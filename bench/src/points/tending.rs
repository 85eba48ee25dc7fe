//! What promotion and thinning read and write, and what they cost receiving.

use super::play::{self, Arrival, BLOCK_BYTES, Source};
use super::{Row, median};
use crate::data::{Kind, Random};
use anyhow::{Context, Result, anyhow, ensure};
use secondsite::target::keeper::Keeper;
use secondsite::target::layers::Layer;
use secondsite::target::promote::promote;
use secondsite::target::tend::merge;
use secondsite_format::ids::Epoch;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What this process has read and written by system calls, bytes.
fn moved() -> Result<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/self/io")?;
    let of = |key: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key)).context("proc io")?;
        Ok(line.trim().parse()?)
    };
    Ok((of("rchar:")?, of("wchar:")?))
}

/// The same blocks of a volume are written in so many epochs, then all are promoted.
pub fn promotion(folder: &Path, mib: u64) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for times in [1, 4, 16] {
        let folder = folder.join(times.to_string());
        std::fs::create_dir(&folder)?;
        let (mut source, keeper) = Source::begin(&folder, mib << 20, None)?;
        let mut random = Random::seeded(6);
        // Every other block.
        let numbers: Vec<u64> = (0..(mib << 20) / BLOCK_BYTES).step_by(2).collect();
        for _ in 0..times {
            let contents = play::blocks(&numbers, Kind::Half, &mut random)?;
            play::receive(&keeper, &source.epoch(&contents)?)?;
        }
        let changed = (numbers.len() as u64 * BLOCK_BYTES) as f64;
        let (read, written) = moved()?;
        let begun = Instant::now();
        ensure!(promote(&keeper, Epoch(times), &|| true).map_err(play::refused)?, "not promoted");
        let rate = changed / begun.elapsed().as_secs_f64() / f64::from(1 << 20);
        let (read, written) = (moved()?.0 - read, moved()?.1 - written);
        let name = format!("blocks written {times} times: written to the replica / changed");
        rows.push(Row::goal(&name, written / changed, "x", 1.01));
        rows.push(Row::new("  read from the journal / changed", read / changed, "x"));
        rows.push(Row::new("  changed bytes a second", rate, "MiB/s"));
        drop(keeper);
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(rows)
}

/// 32 epochs that write half of the same blocks each; every so manieth stays.
pub fn thinning(folder: &Path, mib: u64) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for every in [2, 4, 16] {
        let folder = folder.join(format!("every-{every}"));
        std::fs::create_dir(&folder)?;
        let (mut source, keeper) = Source::begin(&folder, 1 << 34, None)?;
        let mut random = Random::seeded(8);
        for _ in 0..32 {
            let count = (mib << 20) / BLOCK_BYTES / 32;
            let mut numbers: Vec<u64> = (0..count).map(|_| random.next() % (2 * count)).collect();
            numbers.sort_unstable();
            numbers.dedup();
            let contents = play::blocks(&numbers, Kind::Half, &mut random)?;
            play::receive(&keeper, &source.epoch(&contents)?)?;
        }
        play::gather(&keeper, &play::epochs(32), true)?;
        let kept: BTreeSet<Epoch> = (1..=32).filter(|e| e % every == 0).map(Epoch).collect();
        let volume = source.volume_folder();
        let before = play::history_bytes(&volume)? as f64;
        let (read, written) = moved()?;
        let layers: Vec<Layer> = keeper.volume().runs().iter().cloned().map(Layer::Run).collect();
        merge(&keeper, &layers, &kept, &|| true).map_err(play::refused)?;
        drop(layers);
        let (read, written) = (moved()?.0 - read, moved()?.1 - written);
        let dropped = before - play::history_bytes(&volume)? as f64;
        let name = format!("one point of {every} stays: dropped / history");
        rows.push(Row::new(&name, dropped / before, "x"));
        rows.push(Row::new("  written / dropped", written / dropped.max(1.0), "x"));
        rows.push(Row::new("  read / dropped", read / dropped.max(1.0), "x"));
        drop(keeper);
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(rows)
}

const EPOCHS: u64 = 256;
const EPOCH_BLOCKS: u64 = 256;

/// Commits with and without promotion, gathering and thinning beside them, in turns.
pub fn receiving(folder: &Path, rounds: u64) -> Result<Vec<Row>> {
    let (mut alone, mut beside, mut promoted) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        for tended in [false, true] {
            let folder = folder.join(format!("{round}-{tended}"));
            std::fs::create_dir(&folder)?;
            let (mut source, keeper) = Source::begin(&folder, 1 << 32, None)?;
            let mut random = Random::seeded(round);
            let mut arrivals = Vec::new();
            for _ in 0..EPOCHS {
                let mut numbers: Vec<u64> =
                    (0..EPOCH_BLOCKS).map(|_| random.next() % (1 << 20)).collect();
                numbers.sort_unstable();
                numbers.dedup();
                let contents = play::blocks(&numbers, Kind::Half, &mut random)?;
                arrivals.push(source.epoch(&contents)?);
            }
            let seconds = receive(&keeper, &arrivals, tended)?;
            let rate = EPOCHS as f64 / seconds;
            if tended { &mut beside } else { &mut alone }.push(rate);
            if tended {
                let base = keeper.volume().record().base.as_ref().map_or(0, |base| base.epoch.0);
                promoted.push(base as f64 / EPOCHS as f64);
            }
            drop(keeper);
            std::fs::remove_dir_all(&folder)?;
        }
    }
    let ratio = median(beside.iter().zip(&alone).map(|(beside, alone)| beside / alone).collect());
    Ok(vec![
        Row::new("epochs of 1 MiB a second, nothing beside", median(alone), "1/s"),
        Row::new("epochs of 1 MiB a second, promotion and thinning beside", median(beside), "1/s"),
        Row::at_least("  beside / alone", ratio, "x", 0.9),
        Row::new("  promoted meanwhile", median(promoted), "x"),
    ])
}

fn receive(keeper: &Keeper, arrivals: &[Arrival], tended: bool) -> Result<f64> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| -> Result<()> {
            while tended && !over.load(Ordering::Relaxed) {
                let newest = keeper.volume().durable().map_or(0, |facts| facts.epoch.0);
                // One of four stays, and nothing older than 64 epochs.
                let floor = newest.saturating_sub(64) / 4 * 4;
                let kept = (floor..=newest).filter(|e| e % 4 == 0 || *e == newest);
                let kept: BTreeSet<Epoch> = kept.map(Epoch).collect();
                let going = || !over.load(Ordering::Relaxed);
                promote(keeper, Epoch(floor), &going).map_err(play::refused)?;
                if keeper.volume().record().promoting.is_none() {
                    play::gather(keeper, &kept, false)?;
                }
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            Ok(())
        });
        let begun = Instant::now();
        let received = arrivals.iter().try_for_each(|arrival| play::receive(keeper, arrival));
        let seconds = begun.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        beside.join().map_err(|_| anyhow!("the tending thread panicked"))??;
        received.map(|()| seconds)
    })
}
