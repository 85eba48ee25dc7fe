//! A server through all its states.

use super::*;
use std::collections::BTreeMap;

const NOW: i64 = 1_800_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn row(id: &str, phase: VolumePhase) -> VolumeReport {
    VolumeReport {
        id: id.to_owned(),
        phase,
        reason: String::new(),
        code: None,
        tracker: "ebpf".to_owned(),
        tracker_reason: String::new(),
        tracker_code: None,
        cut: "quiet".to_owned(),
        progress_bytes: Some((1 << 20, 3 << 20)),
        backlog_bytes: 4096,
        sent_bytes: 0,
        compares: 0,
    }
}

fn report(rows: &[(&str, VolumePhase)]) -> AgentReport {
    AgentReport {
        agent_version: "0.1.0".to_owned(),
        volumes: rows.iter().map(|(id, phase)| row(id, *phase)).collect(),
        orders: BTreeMap::new(),
        stopped: None,
    }
}

fn point(second: i64, consistency: &str, lacking: &[&str]) -> PointReport {
    PointReport {
        server: "s".to_owned(),
        id: format!("{second:032x}"),
        time_ns: u64::try_from(second).unwrap() * 1_000_000_000,
        generation: 1,
        epochs: BTreeMap::new(),
        consistency: consistency.to_owned(),
        lacking: lacking.iter().map(|id| (*id).to_owned()).collect(),
        reason: "writes came in between".to_owned(),
        kept: false,
        name: None,
    }
}

/// State, reason and loss of a server with the protected volumes of its report.
fn told(
    report: &AgentReport,
    heard: i64,
    points: &[PointReport],
    change: impl FnOnce(&mut Known<'_>),
) -> (String, String, Option<f64>) {
    let mut known = Known {
        name: "db1",
        revoked: false,
        goal_seconds: 30,
        keep_seconds: None,
        certificate_ends: at(NOW + 1000),
        decided: None,
        speed: Speed::default(),
        volumes: Vec::new(),
        agent: Some((report, at(heard))),
        points: points.iter().collect(),
    };
    for row in &report.volumes {
        known.volumes.push(KnownVolume {
            id: &row.id,
            name: &row.id,
            path: "/dev/sda",
            size_bytes: 1 << 30,
            protected: true,
            agent: Some(row),
            since: None,
            target: None,
        });
    }
    change(&mut known);
    let status = server_status(&known, at(NOW));
    let fine = status.state == State::Protected;
    assert_eq!((fine, fine), (status.reason.is_empty(), status.code.is_none()), "{status:?}");
    (status.state.words().to_owned(), status.reason, status.loss_seconds)
}

#[test]
fn phases_become_states() {
    let state = |rows: &[(&str, VolumePhase)], points: &[PointReport]| {
        let (state, reason, loss) = told(&report(rows), NOW, points, |_| {});
        (state, reason, loss)
    };
    use VolumePhase::{Comparing, Connecting, FirstCopy, Following, Stopped};
    let fresh = [point(NOW - 10, "crash", &[]), point(NOW - 4, "fuzzy", &[])];
    assert_eq!(state(&[("sda", Following)], &fresh).0, "protected");
    assert_eq!(state(&[("sda", Following)], &fresh).2, Some(10.0));
    let (copying, reason, _) = state(&[("sda", Following), ("sdb", FirstCopy)], &fresh);
    assert_eq!((copying.as_str(), reason.as_str()), ("first copy", "sdb: 33 % copied"));
    assert_eq!(state(&[("sda", Comparing)], &fresh).0, "comparing");
    assert_eq!(state(&[("sda", Connecting)], &fresh).0, "waiting");
    assert_eq!(state(&[("sda", Connecting), ("sdb", Stopped)], &fresh).0, "stopped");
    assert_eq!(state(&[("sda", Following)], &[]).0, "waiting");
    let old = [point(NOW - 31, "crash", &[])];
    assert_eq!(state(&[("sda", Following)], &old).0, "behind");
    let (behind, reason, _) = state(&[("sda", Connecting)], &old);
    assert!(behind == "behind" && reason.contains("no session"), "{reason}");
    let lacking = [point(NOW - 1, "crash", &["sdb"])];
    assert_eq!(state(&[("sda", Following), ("sdb", Following)], &lacking).0, "waiting");
}

#[test]
fn only_fuzzy_points_are_no_protection() {
    let points = [point(NOW - 1, "fuzzy", &[])];
    let (state, reason, loss) =
        told(&report(&[("sda", VolumePhase::Following)]), NOW, &points, |_| {});
    assert_eq!((state.as_str(), loss), ("behind", None));
    assert!(reason.contains("writes came in between"), "{reason}");
}

#[test]
fn silence_is_told_after_15_seconds() {
    let report = report(&[("sda", VolumePhase::Following)]);
    let points = [point(NOW - 4, "crash", &[])];
    assert_eq!(told(&report, NOW - 15, &points, |_| {}).0, "protected");
    let (state, reason, loss) = told(&report, NOW - 16, &points, |_| {});
    assert_eq!((state.as_str(), loss), ("away", Some(4.0)));
    assert!(reason.contains("systemctl"), "{reason}");
    let (_, reason, _) =
        told(&report, NOW - 16, &points, |known| known.certificate_ends = at(NOW - 1));
    assert!(reason.contains("certificate ended"), "{reason}");
}

#[test]
fn what_was_decided_comes_first() {
    let report = report(&[("sda", VolumePhase::Following)]);
    let state = |change: fn(&mut Known<'_>)| told(&report, NOW, &[], change).0;
    assert_eq!(state(|known| known.revoked = true), "stopped");
    assert_eq!(state(|known| known.volumes[0].protected = false), "unprotected");
    assert_eq!(state(|known| known.volumes.clear()), "joined");
    assert_eq!(state(|known| known.agent = None), "waiting");
    let mut elsewhere = report.clone();
    elsewhere.stopped = Some("this is another machine".to_owned());
    assert_eq!(told(&elsewhere, NOW, &[], |_| {}).1, "this is another machine");
}

#[test]
fn what_the_target_says_is_shown() {
    let target = TargetVolumeReport {
        id: "sda".to_owned(),
        connected: false,
        copied: true,
        generation: 1,
        epoch: Some(7),
        promoted_epoch: Some(6),
        replica: "/srv/replica".to_owned(),
        journal_bytes: 0,
        error: Some("no space".to_owned()),
        refused: None,
    };
    let report = report(&[("sda", VolumePhase::Following)]);
    let points = [point(NOW - 4, "crash", &[])];
    let mut known = Known {
        name: "db1",
        revoked: false,
        goal_seconds: 30,
        keep_seconds: None,
        certificate_ends: at(NOW + 1000),
        decided: None,
        speed: Speed::default(),
        volumes: Vec::new(),
        agent: Some((&report, at(NOW))),
        points: points.iter().collect(),
    };
    known.volumes.push(KnownVolume {
        id: "sda",
        name: "sda",
        path: "/dev/sda",
        size_bytes: 1 << 30,
        protected: true,
        agent: Some(&report.volumes[0]),
        since: None,
        target: Some(&target),
    });
    let status = server_status(&known, at(NOW));
    assert_eq!((status.state, status.code), (State::Stopped, Some(Reason::TargetStorage)));
    assert!(status.reason.contains("no space"), "{}", status.reason);
    assert_eq!((status.volumes[0].epoch, status.volumes[0].promoted_epoch), (Some(7), Some(6)));
}
