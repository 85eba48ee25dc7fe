//! Recovery points: opening them, reading them, keeping them. A source is played by hand against
//! the target's own code in a folder.

mod index;
mod opening;
mod play;
mod reading;
mod tending;

pub use index::look_into;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Small, within half a minute: says whether it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Where the volumes lie; 24 GiB must be free, with --quick two.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A point among 10,000 of a volume of 1 TiB, up to the first byte.
    Opening,
    /// Ten million extents in runs.
    Index,
    /// Reads from an open point, beside qemu-nbd and nbdkit.
    Reading,
    /// Bytes that promotion writes.
    Promotion,
    /// Bytes that thinning moves.
    Thinning,
    /// Commits with promotion and thinning beside them.
    Receiving,
}

/// A figure.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    name: String,
    value: f64,
    unit: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_least: Option<f64>,
}

impl Row {
    fn new(name: &str, value: f64, unit: &str) -> Self {
        Self { name: name.into(), value, unit: unit.into(), at_most: None, at_least: None }
    }

    /// One that should not be larger.
    fn goal(name: &str, value: f64, unit: &str, at_most: f64) -> Self {
        Self { at_most: Some(at_most), ..Self::new(name, value, unit) }
    }

    /// One that should not be smaller.
    fn at_least(name: &str, value: f64, unit: &str, at_least: f64) -> Self {
        Self { at_least: Some(at_least), ..Self::new(name, value, unit) }
    }

    fn print(&self) {
        let goal = match (self.at_most, self.at_least) {
            (Some(most), _) => format!("goal: at most {most}{}", missed(self.value > most)),
            (_, Some(least)) => format!("goal: at least {least}{}", missed(self.value < least)),
            _ => String::new(),
        };
        println!("  {:<58} {:>14.3} {:<8} {goal}", self.name, self.value, self.unit);
    }
}

fn missed(missed: bool) -> &'static str {
    if missed { " MISSED" } else { "" }
}

#[derive(Serialize)]
struct Group {
    name: &'static str,
    rows: Vec<Row>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median, 99th percentile and maximum of seconds; the goal is for the second.
fn percentiles(name: &str, mut seconds: Vec<f64>, at_most: Option<f64>) -> Vec<Row> {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share).round() as usize] * 1000.0;
    let mut p99 = Row::new(&format!("{name}, p99"), at(0.99), "ms");
    p99.at_most = at_most.map(|seconds| seconds * 1000.0);
    let (half, most) = (format!("{name}, p50"), format!("{name}, max"));
    vec![Row::new(&half, at(0.5), "ms"), p99, Row::new(&most, at(1.0), "ms")]
}

/// Runs it.
pub fn measure(options: &Options) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("secondsite-bench-").tempdir_in(&options.dir)?;
    let quick = options.quick;
    let pick = |small: u64, large: u64| if quick { small } else { large };
    let mut groups = Vec::new();
    for part in Part::value_variants() {
        if !options.only.is_empty() && !options.only.contains(part) {
            continue;
        }
        let own = folder.path().join(format!("{part:?}").to_lowercase());
        std::fs::create_dir(&own)?;
        let begun = Instant::now();
        let (name, rows) = match part {
            Part::Opening => (
                "Opening a point of 1 TiB, nothing cached",
                opening::measure(&own, pick(300, 10_000), pick(30, 200))?,
            ),
            Part::Index => ("Index on disk", index::measure(&own, pick(500_000, 10_000_000))?),
            Part::Reading => {
                let runtime = Duration::from_millis(pick(100, 2000));
                let rounds = pick(1, 3) as usize;
                ("Reading an open point", reading::measure(&own, pick(64, 1024), rounds, runtime)?)
            }
            Part::Promotion => ("Promotion", tending::promotion(&own, pick(16, 256))?),
            Part::Thinning => ("Thinning", tending::thinning(&own, pick(128, 1024))?),
            Part::Receiving => ("Receiving", tending::receiving(&own, pick(1, 5))?),
        };
        std::fs::remove_dir_all(&own)?;
        if !options.json {
            println!("{name} ({:.0} s)", begun.elapsed().as_secs_f64());
            rows.iter().for_each(Row::print);
        }
        groups.push(Group { name, rows });
    }
    if options.json {
        let document = serde_json::json!({ "schema_version": 1, "quick": quick, "groups": groups });
        println!("{}", serde_json::to_string_pretty(&document)?);
    }
    Ok(())
}
