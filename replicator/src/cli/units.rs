//! Sizes and spans of time, as people type and read them.
//!
//! Typed: `4KiB`, `1GiB`, `30s`, `5min`, `1h`, `7d`. Shown: sizes in IEC units, rates in MB/s.

use bytesize::ByteSize;
use std::time::Duration;

/// Text that is no size or no span of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}")]
pub struct BadUnit {
    text: String,
    what: &'static str,
}

/// A size: a number with B, KiB, MiB, GiB, TiB (or kB, MB, …).
pub fn parse_bytes(text: &str) -> Result<u64, BadUnit> {
    text.parse::<ByteSize>()
        .map(|size| size.0)
        .map_err(|_| BadUnit { text: text.into(), what: "size (such as 4KiB or 2GiB)" })
}

/// A span of time: a whole number with s, min (or m), h, d.
pub fn parse_seconds(text: &str) -> Result<u64, BadUnit> {
    let bad = || BadUnit { text: text.into(), what: "span of time (such as 30s, 5min, 1h or 7d)" };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim_start() {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(bad()),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(bad)
}

/// `41.2 GiB`, `480 GiB`, `12 B`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = UNITS.iter().enumerate().rev().find(|(i, _)| count >> (10 * i) > 0);
    let (power, name) = unit.map_or((0, "B"), |(i, name)| (i, *name));
    let value = count as f64 / (1u64 << (10 * power)) as f64;
    let text = format!("{value:.1}");
    format!("{} {name}", text.strip_suffix(".0").unwrap_or(&text))
}

/// `98 MB/s`, `0.6 MB/s`.
pub fn rate(bytes_per_second: f64) -> String {
    let value = bytes_per_second / 1e6;
    if value >= 10.0 { format!("{value:.0} MB/s") } else { format!("{value:.1} MB/s") }
}

/// `4 s`, `7 min`, `3 h`, `2 d`: the largest unit that gives at least two.
pub fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

/// A goal as it was typed: `30s`, `5min`, `1h`.
pub fn goal(seconds: u64) -> String {
    match seconds {
        0 => "0s".into(),
        s if s % 86400 == 0 => format!("{}d", s / 86400),
        s if s % 3600 == 0 => format!("{}h", s / 3600),
        s if s % 60 == 0 => format!("{}min", s / 60),
        s => format!("{s}s"),
    }
}

/// Time since a start, as `0:19`.
pub fn clock(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::{bytes, goal, parse_bytes, parse_seconds, rate, span};

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("4KiB"), Ok(4096));
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("16384"), Ok(16384));
        assert!(parse_bytes("four").is_err());
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(480 << 30), "480 GiB");
        assert_eq!(bytes((1.2 * 1_048_576.0) as u64), "1.2 MiB");
        assert_eq!(bytes(u64::MAX), "16 EiB");
        assert_eq!(rate(98e6), "98 MB/s");
        assert_eq!(rate(0.62e6), "0.6 MB/s");
    }

    #[test]
    fn spans() {
        assert_eq!(parse_seconds("30s"), Ok(30));
        assert_eq!(parse_seconds("5min"), Ok(300));
        assert_eq!(parse_seconds("1h"), Ok(3600));
        assert_eq!(parse_seconds("7d"), Ok(604_800));
        for wrong in ["", "30", "s", "-1s", "1w", "99999999999999999999s", "1e3s"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
        assert_eq!(span(4.2), "4 s");
        assert_eq!(span(432.0), "7 min");
        assert_eq!(goal(30), "30s");
        assert_eq!(goal(90), "90s");
        assert_eq!(goal(300), "5min");
    }
}
