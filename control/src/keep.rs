//! How long recovery points are kept, as people write it: `none`, `24h`, or `24h,15d`.

use crate::api::KeepPolicy;

/// The default of `protect`.
pub const DEFAULT: &str = "24h,15d";
/// Longest history, seconds: ten years.
const SECONDS_MAX: u64 = 10 * 365 * 86400;

/// Why a text is no retention.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoKeep {
    /// Not one or two times.
    #[error("{0:?}: it is `none`, a time, or two times, as in 24h,15d")]
    Form(String),
    /// Not a number with a unit.
    #[error("{0:?} is no time: a whole number with s, min, h or d, from 1min to 10 years")]
    Time(String),
    /// The first is longer than the second.
    #[error("the first time (one point per 5 minutes) is longer than the second (one per hour)")]
    Order,
}

/// Reads it; none for `none`. With one time there is no second tier.
pub fn parse(text: &str) -> Result<Option<KeepPolicy>, NoKeep> {
    if text == "none" {
        return Ok(None);
    }
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    let (fine, coarse) = match parts[..] {
        [one] => (one, one),
        [fine, coarse] => (fine, coarse),
        _ => return Err(NoKeep::Form(text.to_owned())),
    };
    let policy = KeepPolicy { fine_seconds: seconds(fine)?, coarse_seconds: seconds(coarse)? };
    if policy.fine_seconds > policy.coarse_seconds {
        return Err(NoKeep::Order);
    }
    Ok(Some(policy))
}

fn seconds(text: &str) -> Result<u64, NoKeep> {
    let wrong = || NoKeep::Time(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[digits..] {
        "s" => 1,
        "min" | "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(wrong()),
    };
    let seconds = text[..digits].parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    seconds.filter(|seconds| (60..=SECONDS_MAX).contains(seconds)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_is_read_as_people_write_it() {
        let policy =
            |fine_seconds, coarse_seconds| Ok(Some(KeepPolicy { fine_seconds, coarse_seconds }));
        assert_eq!(parse("none"), Ok(None));
        assert_eq!(parse(DEFAULT), policy(86400, 15 * 86400));
        assert_eq!(parse("90min"), policy(5400, 5400));
        assert_eq!(parse("24h, 7d"), policy(86400, 7 * 86400));
        assert_eq!(parse("7d,24h"), Err(NoKeep::Order));
        for text in ["", "24", "h", "1s", "-1h", "24h,7d,9d", "99999999999999999999d", "4000d"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
