//! Protect, orders, points and status, with an agent and a target that only report.

use crate::site::{Joined, Site, agent_report, protect, target_report};
use secondsite_control::api::{
    OrderKind, OrderResult, OrderState, ProtectRequest, TrackerChoice, VolumePhase,
};
use secondsite_control::codes::{Reason, State};
use std::time::Duration;

const POINT: &str = "0123456789abcdef0123456789abcdef";

async fn joined() -> (Site, Joined) {
    let site = Site::new().await;
    let db1 = site.enrol(&site.setup.token, "db1").await.unwrap();
    (site, db1)
}

async fn state(site: &Site) -> String {
    site.operator().server_status("db1").await.unwrap().servers[0].state.words().to_owned()
}

#[tokio::test]
async fn protect_reaches_agent_and_target() {
    let (site, db1) = joined().await;
    let operator = site.operator();
    let version = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap().version;
    let target = site.target().target_poll(0, 0).await.unwrap().assignment.unwrap();
    assert!(!target.servers[0].active);
    let dry = ProtectRequest { dry_run: true, ..protect(&["all"]) };
    let plan = operator.protect("db1", &dry).await.unwrap();
    assert_eq!(plan.volumes.len(), 1);
    assert_eq!(plan.volumes[0].skipped_swap, [("sda3".to_owned(), 1 << 20)]);
    assert!(db1.client.agent_poll(version, 0, 0).await.unwrap().assignment.is_none());
    // Both wait; protecting wakes both.
    let (site_target, request) = (site.target(), protect(&["all"]));
    let (agent, at_target, reply) = tokio::join!(
        db1.client.agent_poll(version, 0, 60),
        site_target.target_poll(target.version, 60),
        operator.protect("db1", &request),
    );
    assert_eq!(reply.unwrap(), plan);
    let assignment = agent.unwrap().assignment.unwrap();
    assert!(assignment.version > version);
    assert_eq!(assignment.volumes[0].path, "/dev/sda");
    assert_eq!(assignment.volumes[0].excluded, [(1 << 20, 1 << 20)]);
    let server = at_target.unwrap().assignment.unwrap().servers.remove(0);
    assert!(server.active);
    assert_eq!(server.machine, crate::site::MACHINE);
    assert_eq!(server.volumes[0].id, assignment.volumes[0].id);
    // Ended and begun again: the same replica.
    operator.unprotect("db1").await.unwrap();
    let poll = db1.client.agent_poll(assignment.version, 0, 0).await.unwrap();
    assert!(poll.assignment.unwrap().volumes.is_empty());
    let server =
        site.target().target_poll(0, 0).await.unwrap().assignment.unwrap().servers.remove(0);
    assert!(!server.active && server.volumes[0].id == assignment.volumes[0].id);
    assert_eq!(operator.unprotect("db1").await.unwrap_err().exit_code(), 78);
    operator.protect("db1", &protect(&["/dev/sda"])).await.unwrap();
    let again = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    assert_eq!(again.volumes[0].id, assignment.volumes[0].id);
}

#[tokio::test]
async fn what_cannot_be_protected_is_named() {
    let (site, _db1) = joined().await;
    let operator = site.operator();
    let refused = async |request: ProtectRequest| {
        let error = operator.protect("db1", &request).await.unwrap_err();
        (error.exit_code(), error.to_string())
    };
    operator.protect("db1", &protect(&["sda"])).await.unwrap();
    let (code, message) = refused(protect(&["sda"])).await;
    assert_eq!((code, message.as_str()), (64, "/dev/sda of db1 is protected already"));
    let (code, message) = refused(protect(&["/dev/sda1"])).await;
    assert!(code == 64 && message.contains("overlaps /dev/sda"), "{message}");
    let (code, message) = refused(protect(&["/dev/sdq"])).await;
    assert!(code == 64 && message.contains("/dev/sdq"), "{message}");
    let ebpf = ProtectRequest { tracker: TrackerChoice::Ebpf, ..protect(&["loop3"]) };
    assert_eq!(refused(ebpf).await.0, 69);
    let kept = ProtectRequest { keep: "24".to_owned(), ..protect(&["loop3"]) };
    assert_eq!(refused(kept).await.0, 64);
    let error = operator.protect("db9", &protect(&["all"])).await.unwrap_err();
    assert!(error.to_string().contains("db9"), "{error}");
    // A refused request changed nothing.
    assert_eq!(operator.server_status("db1").await.unwrap().servers[0].volumes.len(), 1);
}

#[tokio::test]
async fn a_device_that_came_later_can_be_offered() {
    let (site, db1) = joined().await;
    let mut inventory = crate::site::inventory();
    let mut later = inventory[2].clone();
    (later.name, later.path) = ("loop4".to_owned(), "/dev/loop4".to_owned());
    inventory.push(later);
    db1.client.agent_inventory(&inventory).await.unwrap();
    site.operator().protect("db1", &protect(&["/dev/loop4"])).await.unwrap();
    inventory[0].path = "/dev/../etc/shadow".to_owned();
    assert_eq!(db1.client.agent_inventory(&inventory).await.unwrap_err().exit_code(), 64);
}

#[tokio::test]
async fn an_order_goes_there_and_back() {
    let (site, db1) = joined().await;
    let operator = site.operator();
    let error = operator.order("db1", OrderKind::Cut).await.unwrap_err();
    assert_eq!(error.exit_code(), 78);
    operator.protect("db1", &protect(&["sda"])).await.unwrap();
    let assignment = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    let volume = assignment.volumes[0].id.as_str();
    let (poll, order) = tokio::join!(
        db1.client.agent_poll(assignment.version, 0, 60),
        operator.order("db1", OrderKind::Cut)
    );
    let number = order.unwrap().number;
    let orders = poll.unwrap().orders;
    assert_eq!((orders[0].number, orders[0].what), (number, OrderKind::Cut));
    assert_eq!(operator.order_state("db1", number, 0).await.unwrap(), OrderState::Waiting);
    let mut report = agent_report(&[volume], VolumePhase::Following);
    let running = OrderState::Running { percent: 40, note: "draining".to_owned() };
    report.orders.insert(number, running.clone());
    db1.client.agent_report(&report).await.unwrap();
    assert_eq!(operator.order_state("db1", number, 0).await.unwrap(), running);
    // Done is held until the target lists the point; then the waiting one is woken.
    let result = OrderResult::Cut { point: POINT.to_owned(), exact: true };
    let done = OrderState::Done { result };
    report.orders.insert(number, done.clone());
    db1.client.agent_report(&report).await.unwrap();
    let held = operator.order_state("db1", number, 0).await.unwrap();
    assert!(matches!(held, OrderState::Running { percent: 100, .. }), "{held:?}");
    let listed = target_report(&db1.reply.id, volume, &[(POINT, jiff::Timestamp::now())]);
    let target = site.target();
    let (state, reported) =
        tokio::join!(operator.order_state("db1", number, 60), target.target_report(&listed));
    reported.unwrap();
    assert_eq!(state.unwrap(), done);
    let points = operator.points("db1").await.unwrap().points;
    assert_eq!((points[0].id.as_str(), points[0].epochs["sda"]), (POINT, 5));
    assert!(points[0].time.ends_with('Z'));
    // A finished order is not given again, also to an agent that forgot all.
    assert!(db1.client.agent_poll(0, 0, 0).await.unwrap().orders.is_empty());
    // A later report does not change what is final.
    report.orders.insert(number, running);
    db1.client.agent_report(&report).await.unwrap();
    target.target_report(&target_report(&db1.reply.id, volume, &[])).await.unwrap();
    assert_eq!(operator.order_state("db1", number, 0).await.unwrap(), done);
}

#[tokio::test]
async fn a_point_that_is_never_listed_ends_the_wait() {
    let (site, db1) = joined().await;
    let operator = site.operator();
    operator.protect("db1", &protect(&["sda"])).await.unwrap();
    let number = operator.order("db1", OrderKind::Cut).await.unwrap().number;
    let mut report = agent_report(&[], VolumePhase::Following);
    let result = OrderResult::Cut { point: POINT.to_owned(), exact: true };
    report.orders.insert(number, OrderState::Done { result });
    db1.client.agent_report(&report).await.unwrap();
    site.clock.advance(Duration::from_secs(31));
    let state = operator.order_state("db1", number, 0).await.unwrap();
    assert!(matches!(state, OrderState::Failed { exit_code: 75, .. }), "{state:?}");
}

#[tokio::test]
async fn a_point_that_a_later_one_replaced_before_it_was_listed_is_done() {
    const LATER: &str = "ffffffffffffffffffffffffffffffff";
    let (site, db1) = joined().await;
    let operator = site.operator();
    operator.protect("db1", &protect(&["sda"])).await.unwrap();
    let assignment = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    let volume = assignment.volumes[0].id.as_str();
    let number = operator.order("db1", OrderKind::Cut).await.unwrap().number;
    let mut report = agent_report(&[volume], VolumePhase::Following);
    let result = OrderResult::Cut { point: POINT.to_owned(), exact: true };
    let done = OrderState::Done { result };
    report.orders.insert(number, done.clone());
    db1.client.agent_report(&report).await.unwrap();
    let others = target_report(&db1.reply.id, volume, &[(LATER, jiff::Timestamp::now())]);
    let target = site.target();
    // At once: perhaps a report that was on its way since before the commit.
    target.target_report(&others).await.unwrap();
    let held = operator.order_state("db1", number, 0).await.unwrap();
    assert!(matches!(held, OrderState::Running { percent: 100, .. }), "{held:?}");
    site.clock.advance(Duration::from_secs(5));
    target.target_report(&others).await.unwrap();
    assert_eq!(operator.order_state("db1", number, 0).await.unwrap(), done);
}

#[tokio::test]
async fn an_order_ends_with_the_protection() {
    let (site, _db1) = joined().await;
    let operator = site.operator();
    operator.protect("db1", &protect(&["sda"])).await.unwrap();
    let number = operator.order("db1", OrderKind::Verify).await.unwrap().number;
    let (state, ended) =
        tokio::join!(operator.order_state("db1", number, 60), operator.unprotect("db1"));
    ended.unwrap();
    assert!(matches!(state.unwrap(), OrderState::Failed { exit_code: 1, .. }));
}

#[tokio::test]
async fn status_follows_the_reports() {
    let (mut site, db1) = joined().await;
    let operator = site.operator();
    assert_eq!(state(&site).await, "joined");
    operator.protect("db1", &protect(&["sda"])).await.unwrap();
    assert_eq!(state(&site).await, "waiting");
    let assignment = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    let volume = assignment.volumes[0].id.as_str();
    let report = |phase| agent_report(&[volume], phase);
    db1.client.agent_report(&report(VolumePhase::FirstCopy)).await.unwrap();
    assert_eq!(state(&site).await, "first copy");
    assert!(operator.status().await.unwrap().warnings[0].text.contains("has not reported yet"));
    let point = [(POINT, jiff::Timestamp::now())];
    site.target().target_report(&target_report(&db1.reply.id, volume, &point)).await.unwrap();
    db1.client.agent_report(&report(VolumePhase::Following)).await.unwrap();
    let status = operator.status().await.unwrap();
    assert!(status.warnings.is_empty(), "{:?}", status.warnings);
    let server = &status.servers[0];
    assert_eq!((server.state.code(), server.reason.as_str()), ("protected", ""));
    assert!(server.loss_seconds.unwrap() < 20.0);
    assert_eq!(server.volumes[0].replica.as_deref(), Some("/srv/secondsite/replica"));
    assert_eq!((server.volumes[0].epoch, server.volumes[0].promoted_epoch), (Some(5), Some(5)));
    site.clock.advance(Duration::from_secs(31));
    db1.client.agent_report(&report(VolumePhase::Following)).await.unwrap();
    assert_eq!(state(&site).await, "behind");
    assert!(operator.status().await.unwrap().warnings[0].text.contains("was not heard for"));
    site.clock.advance(Duration::from_secs(16));
    assert_eq!(state(&site).await, "away");
    // A restart remembers the last saved report.
    site.stop().await;
    site.start().await;
    assert_eq!(state(&site).await, "away");
}

#[tokio::test]
async fn codes_since_speed_and_percent() {
    let (site, db1) = joined().await;
    let operator = site.operator();
    let server =
        async || operator.server_status("db1").await.unwrap().servers.into_iter().next().unwrap();
    let at = |since: &Option<String>| since.as_ref().unwrap().parse::<jiff::Timestamp>().unwrap();
    let new = server().await;
    assert_eq!((new.state, new.code), (State::Joined, Some(Reason::NothingProtected)));
    let joined = at(&new.since);
    operator.protect("db1", &protect(&["sda", "loop3"])).await.unwrap();
    let waiting = server().await;
    assert_eq!((waiting.state, waiting.code), (State::Waiting, Some(Reason::AgentNotStarted)));
    assert!(at(&waiting.since) > joined, "since it was protected");
    let assignment = db1.client.agent_poll(0, 0, 0).await.unwrap().assignment.unwrap();
    let ids: Vec<&str> = assignment.volumes.iter().map(|volume| volume.id.as_str()).collect();
    let copying = async |first: u64, second: Option<u64>, sent: u64| {
        let mut report = agent_report(&ids, VolumePhase::FirstCopy);
        report.volumes[0].progress_bytes = Some((first, 1 << 30));
        report.volumes[1].progress_bytes = second.map(|done| (done, 1 << 30));
        if second.is_none() {
            report.volumes[1].phase = VolumePhase::Following;
        }
        report.volumes[0].sent_bytes = sent;
        db1.client.agent_report(&report).await.unwrap();
        server().await
    };
    let row = copying(0, Some(0), 0).await;
    assert_eq!((row.state, row.code), (State::FirstCopy, Some(Reason::FirstCopyRunning)));
    assert_eq!(
        (row.percent, row.left_seconds, row.sending_bytes_per_second),
        (Some(0), None, None)
    );
    let since = at(&row.since);
    site.clock.advance(Duration::from_secs(10));
    let row = copying(1 << 27, Some(1 << 29), 5 << 20).await;
    assert_eq!((row.percent, at(&row.since)), (Some(31), since));
    let (left, speed) = (row.left_seconds.unwrap(), row.sending_bytes_per_second.unwrap());
    assert!((20.0..23.0).contains(&left), "{left}");
    assert!((480_000.0..530_000.0).contains(&speed), "{speed}");
    // One is through: the whole does not fall.
    let row = copying(1 << 27, None, 6 << 20).await;
    assert_eq!(row.percent, Some(56));
    let row = copying((1 << 30) - 1, None, 6 << 20).await;
    assert_eq!(row.percent, Some(99), "full only when it is");
    site.clock.advance(Duration::from_secs(3));
    let mut report = agent_report(&ids, VolumePhase::Connecting);
    report.volumes[1].code = Some(Reason::TargetFull);
    report.volumes[1].reason = "no space left".to_owned();
    db1.client.agent_report(&report).await.unwrap();
    let row = server().await;
    assert_eq!(
        (row.state, row.code, row.percent),
        (State::Waiting, Some(Reason::TargetFull), None)
    );
    assert!(at(&row.since) > since);
    site.clock.advance(Duration::from_secs(16));
    let row = server().await;
    assert_eq!((row.state, row.code), (State::Away, Some(Reason::AgentSilent)));
    assert_eq!(row.sending_bytes_per_second, None, "of then, not of now");
}

#[tokio::test]
async fn control_characters_of_an_agent_never_reach_a_terminal() {
    let (site, db1) = joined().await;
    site.operator().protect("db1", &protect(&["sda"])).await.unwrap();
    let mut report = agent_report(&[], VolumePhase::Following);
    report.stopped = Some("\u{1b}]0;owned\u{7} elsewhere".to_owned());
    db1.client.agent_report(&report).await.unwrap();
    let status = site.operator().server_status("db1").await.unwrap();
    assert_eq!(status.servers[0].reason, "]0;owned elsewhere");
}
