//! What a command prints: data on stdout, talk and progress on stderr.
//!
//! With `--json` stdout holds exactly one document (one a line where a command follows something).
//! A progress bar is drawn only on a terminal; elsewhere there is a line every [`TALK_EVERY`].

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often progress is told where no bar can be drawn.
const TALK_EVERY: Duration = Duration::from_secs(10);
/// What is left is told by the speed of this last span.
const LEFT_WINDOW: Duration = Duration::from_secs(60);
/// Blanks between two columns.
const GAP: u16 = 2;

/// Whether colour is welcome at all; the stream must be a terminal besides.
pub fn colour_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && !dumb()
}

fn dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}

/// Whether stderr is a terminal that can move its cursor.
pub fn stderr_draws() -> bool {
    std::io::stderr().is_terminal() && !dumb()
}

/// Whether stdout is a terminal that can move its cursor.
pub fn stdout_draws() -> bool {
    std::io::stdout().is_terminal() && !dumb()
}

/// Prints to stdout. A reader that went away ends the command quietly.
pub fn data(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Whether this process has printed its document.
static PRINTED: AtomicBool = AtomicBool::new(false);

/// Whether [`document`] was called: a failure after it adds no second document.
pub fn document_printed() -> bool {
    PRINTED.load(Ordering::Relaxed)
}

/// Prints one document to stdout, for people's eyes too.
pub fn document<T: Serialize>(value: &T) {
    PRINTED.store(true, Ordering::Relaxed);
    let text = serde_json::to_string_pretty(value).expect("plain data becomes JSON");
    data(&(text + "\n"));
}

/// Prints one document as one line to stdout.
pub fn document_line<T: Serialize>(value: &T) {
    PRINTED.store(true, Ordering::Relaxed);
    let text = serde_json::to_string(value).expect("plain data becomes JSON");
    data(&(text + "\n"));
}

/// Prints a line to stderr; a closed stderr is no reason to stop.
pub fn talk(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Columns under a header, left-aligned, without lines.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec()).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_string()).collect();
    lines.join("\n") + "\n"
}

/// How far something is, on stderr.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    percent: u8,
    left: Left,
    told: Option<Instant>,
}

impl Progress {
    /// Nothing is shown before the first [`Self::at`].
    pub fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = stderr_draws().then(|| {
            let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
            let style =
                ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} %  {wide_msg}");
            bar.with_style(style.expect("the template is well formed")).with_prefix(what.clone())
        });
        Self { what, bar, percent: 0, left: Left::default(), told: None }
    }

    /// Another phase begins, from zero; the same one goes on.
    pub fn begin(&mut self, what: impl Into<String>) {
        let what = what.into();
        if what != self.what {
            (self.percent, self.left, self.told) = (0, Left::default(), None);
            if let Some(bar) = &self.bar {
                bar.set_prefix(what.clone());
            }
            self.what = what;
        }
    }

    /// So many percent are done. It never goes back.
    pub fn at(&mut self, percent: u8, note: &str) {
        self.percent = self.percent.max(percent.min(100));
        if let Some(bar) = &self.bar {
            bar.set_position(u64::from(self.percent));
            bar.set_message(note.to_string());
            return;
        }
        let now = Instant::now();
        if self.told.is_none_or(|told| now - told >= TALK_EVERY) {
            self.told = Some(now);
            let gap = if note.is_empty() { "" } else { "  " };
            talk(&format!("{} {} %{gap}{note}", self.what, self.percent));
        }
    }

    /// As [`Self::at`], with the time that is left by the speed of the last minute.
    pub fn at_with_left(&mut self, percent: u8, note: &str) {
        let left = match self.left.after(percent, Instant::now()) {
            _ if percent >= 100 => String::new(),
            Some(seconds) => format!("{} left  ", super::units::span(seconds)),
            None => "calculating  ".into(),
        };
        self.at(percent, &format!("{left}{note}"));
    }

    /// How long a wait for news may be without the display falling behind.
    pub fn step(&self) -> Duration {
        if self.bar.is_some() { Duration::from_secs(1) } else { TALK_EVERY }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long something will take, by its speed within [`LEFT_WINDOW`].
#[derive(Default)]
struct Left {
    seen: VecDeque<(Instant, u8)>,
}

impl Left {
    /// Seconds until 100 %; none before it is known.
    fn after(&mut self, percent: u8, now: Instant) -> Option<f64> {
        if self.seen.back().is_some_and(|(_, last)| *last > percent) {
            self.seen.clear();
        }
        self.seen.push_back((now, percent));
        // The newest sample outside the window stays: it is where the window begins.
        while self.seen.get(1).is_some_and(|(at, _)| now - *at >= LEFT_WINDOW) {
            self.seen.pop_front();
        }
        let (at, before) = self.seen.front()?;
        let (seconds, done) = ((now - *at).as_secs_f64(), percent - before);
        (done > 0).then(|| f64::from(100 - percent.min(100)) * seconds / f64::from(done))
    }
}

#[cfg(test)]
mod tests {
    use super::{Left, Progress, table};
    use std::time::{Duration, Instant};

    #[test]
    fn what_is_left_comes_from_the_last_minute() {
        let (mut left, start) = (Left::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(left.after(0, at(0)), None);
        assert_eq!(left.after(0, at(5)), None, "nothing done says nothing");
        assert_eq!(left.after(10, at(10)), Some(90.0));
        assert_eq!(left.after(20, at(70)), Some(80.0 * 60.0 / 10.0), "as fast as lately");
        assert_eq!(left.after(20, at(140)), None, "and standing still is not told as a time");
        assert_eq!(left.after(5, at(141)), None, "begun again");
    }

    #[test]
    fn percents_only_grow_within_a_phase() {
        let mut progress = Progress::new("cut db1");
        for (said, shown) in [(3, 3), (2, 3), (200, 100), (50, 100)] {
            progress.at(said, "");
            assert_eq!(progress.percent, shown);
        }
        progress.begin("cut db1");
        assert_eq!(progress.percent, 100);
        progress.begin("compare db1");
        assert_eq!(progress.percent, 0);
    }

    #[test]
    fn columns_stand_two_blanks_apart() {
        let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
        let text = table(
            &["SERVER", "STATE", "GOAL"],
            vec![row(&["db1", "protected", "30s"]), row(&["a-long-name", "4 s · 1.2 MiB", "5min"])],
        );
        let expected = "SERVER       STATE          GOAL\n\
                        db1          protected      30s\n\
                        a-long-name  4 s · 1.2 MiB  5min\n";
        assert_eq!(text, expected);
    }
}
