//! Measures alternatives in turns, so that drift of the machine hits all of them alike.

use serde::Serialize;
use std::fmt;
use std::time::Instant;

/// One alternative: a name, and work that returns what must not be optimised away.
pub struct Case<'a> {
    /// Shown in the table.
    pub name: &'static str,
    /// Done once a round.
    pub work: Box<dyn FnMut() -> u64 + 'a>,
}

impl<'a> Case<'a> {
    /// An alternative.
    pub fn new(name: &'static str, work: impl FnMut() -> u64 + 'a) -> Self {
        Self { name, work: Box::new(work) }
    }
}

/// What came of one alternative.
#[derive(Debug, Serialize)]
pub struct Row {
    name: &'static str,
    /// Work done a second, in the group's unit; the median of all rounds.
    rate: f64,
    /// Median over the rounds of (baseline's time / this one's): above 1 is faster.
    ratio: f64,
}

/// Alternatives for one job.
#[derive(Debug, Serialize)]
pub struct Group {
    name: &'static str,
    unit: &'static str,
    rows: Vec<Row>,
}

impl Group {
    /// Runs all cases `rounds` times in turns; the first is the baseline. One run of a case does
    /// `amount` units of work.
    pub fn measure(
        name: &'static str,
        unit: &'static str,
        amount: f64,
        rounds: usize,
        mut cases: Vec<Case<'_>>,
    ) -> Self {
        let mut times = vec![Vec::with_capacity(rounds); cases.len()];
        // The first round warms caches and clocks up and does not count.
        for round in 0..=rounds {
            for (case, times) in cases.iter_mut().zip(&mut times) {
                let start = Instant::now();
                std::hint::black_box((case.work)());
                if round > 0 {
                    times.push(start.elapsed().as_secs_f64().max(1e-9));
                }
            }
        }
        let rows = cases.iter().zip(&times).map(|(case, own)| Row {
            name: case.name,
            rate: amount / median(own.clone()),
            ratio: median(times[0].iter().zip(own).map(|(base, own)| base / own).collect()),
        });
        Self { name, unit, rows: rows.collect() }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.name)?;
        for row in &self.rows {
            let (rate, ratio) = (row.rate, row.ratio);
            writeln!(f, "  {:<44} {rate:>12.1} {:<10} {ratio:>8.2}x", row.name, self.unit)?;
        }
        Ok(())
    }
}
