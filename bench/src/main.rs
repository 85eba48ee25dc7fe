//! Benchmarks. `micro` measures the steps of the data path side by side in one run, `sync` a first
//! copy and a delta beside what an administrator would type instead, `points` what recovery points
//! cost.
//!
//! Machines differ and the same machine drifts by a factor of two between runs, so every row is
//! also given as a ratio to one that was measured in turns with it.

mod data;
mod deployment;
mod micro;
mod points;
mod sync;
mod turns;

use clap::{Parser, Subcommand};
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Benchmarks of Secondsite", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Digests, compression, frames and bitmaps, single-threaded, as ratios side by side.
    Micro {
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
        /// Rounds of turns; the median counts.
        #[arg(long, default_value_t = 15)]
        rounds: usize,
    },
    /// First copy and delta of a loop device over TLS on loopback, beside dd, lz4 and nc, and
    /// nbdcopy. Needs root.
    Sync(sync::Options),
    /// Recovery points: opening, index, reading, promotion, thinning.
    Points(points::Options),
    /// What `points` looks into an index with.
    #[command(hide = true)]
    LookInto {
        /// Where the volume lies.
        folder: PathBuf,
    },
    /// The target that `sync` starts for itself.
    #[command(hide = true)]
    ServeTarget {
        /// State and store.
        folder: PathBuf,
        /// The volume's size.
        bytes: u64,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().what {
        What::Micro { json, rounds } => micro(json, rounds),
        What::Sync(options) => sync::measure(&options),
        What::Points(options) => points::measure(&options),
        What::LookInto { folder } => points::look_into(&folder),
        What::ServeTarget { folder, bytes } => deployment::serve_target(&folder, bytes),
    }
}

fn micro(json: bool, rounds: usize) -> anyhow::Result<()> {
    anyhow::ensure!(rounds > 0, "--rounds must be at least 1");
    let groups = micro::measure(rounds);
    if json {
        let document =
            serde_json::json!({ "schema_version": 1, "rounds": rounds, "groups": groups });
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        for group in &groups {
            print!("{group}");
        }
    }
    Ok(())
}
