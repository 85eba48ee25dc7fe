//! Benchmarks. `micro` measures the steps of the data path side by side in one run.
//!
//! Machines differ and the same machine drifts by a factor of two between runs, so every row is
//! also given as a ratio to a baseline that was measured in turns with it.

mod micro;
mod turns;

use clap::{Parser, Subcommand};

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
}

fn main() -> anyhow::Result<()> {
    let What::Micro { json, rounds } = Arguments::parse().what;
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
