//! `secondsite cut` and `secondsite verify`: orders to an agent, and waiting for them.

use super::args::CutArgs;
use super::failure::{Exit, Failure};
use super::operator::Operator;
use super::output::Progress;
use super::{Context, output, points, units};
use secondsite_control::api::{
    OrderKind, OrderReply, OrderResult, OrderState, SCHEMA_VERSION, VerifyResult,
};
use serde_json::json;
use std::time::{Duration, Instant};

/// How long `cut --wait` waits.
const CUT_WAIT_MAX: Duration = Duration::from_secs(240);
/// Longest single wait that is asked of control.
const POLL_MAX: Duration = Duration::from_secs(20);
/// Differing ranges of a volume that are shown.
const RANGES_SHOWN: usize = 8;

pub(super) fn cut(context: &Context, args: &CutArgs) -> Result<(), Failure> {
    let began = Instant::now();
    let operator = Operator::open(context)?;
    let order = give(&operator, &args.server, OrderKind::Cut)?;
    if !args.wait {
        if context.json {
            let document = json!({ "schema_version": SCHEMA_VERSION, "order": order.number });
            output::document(&document);
        } else {
            output::data(&format!("Cut of {} recorded as order {}\n", args.server, order.number));
        }
        return Ok(());
    }
    let deadline = began + CUT_WAIT_MAX;
    let mut progress = Progress::new(format!("cut {}", args.server));
    let result = follow(&operator, &args.server, &order, Some(deadline), &mut progress);
    progress.finish();
    let Some(result) = result? else { return Err(too_late(context, &operator, &args.server)) };
    let OrderResult::Cut { point, exact } = result else {
        return Err(Failure::new(Exit::Failed, "control answered a cut with something else"));
    };
    if context.json {
        let document = json!({ "schema_version": SCHEMA_VERSION, "point": point, "exact": exact });
        output::document(&document);
    } else {
        let kind = if exact { "exact" } else { "fuzzy" };
        let time = units::clock(began.elapsed());
        output::data(&format!("Point {point} of {} is committed, {kind} ({time})\n", args.server));
    }
    Ok(())
}

pub(super) fn verify(context: &Context, server: &str) -> Result<(), Failure> {
    let operator = Operator::open(context)?;
    let order = give(&operator, server, OrderKind::Verify)?;
    let mut progress = Progress::new(format!("verify {server}"));
    let result = follow(&operator, server, &order, None, &mut progress);
    progress.finish();
    let Some(OrderResult::Verify { volumes }) = result? else {
        return Err(Failure::new(Exit::Failed, "control answered a verify with something else"));
    };
    if context.json {
        let document = json!({ "schema_version": SCHEMA_VERSION, "volumes": volumes });
        output::document(&document);
    } else {
        output::data(&table(&volumes));
    }
    let bad: Vec<&str> =
        volumes.iter().filter(|v| v.differing_bytes > 0).map(|v| v.name.as_str()).collect();
    if bad.is_empty() {
        return Ok(());
    }
    let what = format!("{server} and its replica differ: {}", bad.join(", "));
    Err(Failure::new(Exit::DataDiffers, what)
        .still("replication goes on; what differs is not repaired by itself")
        .hint(context.command(&format!("status {server}"))))
}

fn give(operator: &Operator, server: &str, kind: OrderKind) -> Result<OrderReply, Failure> {
    operator.ask(|control| control.order(server, kind))
}

/// Waits for an order. `None`: the deadline passed.
fn follow(
    operator: &Operator,
    server: &str,
    order: &OrderReply,
    deadline: Option<Instant>,
    progress: &mut Progress,
) -> Result<Option<OrderResult>, Failure> {
    let mut wait = Duration::ZERO;
    loop {
        match operator.ask(|control| control.order_state(server, order.number, wait.as_secs()))? {
            OrderState::Done { result } => return Ok(Some(result)),
            OrderState::Failed { exit_code, message } => {
                return Err(Failure::new(Exit::from_code(exit_code), message)
                    .still("replication goes on where it can")
                    .hint(format!("secondsite explain {server}")));
            }
            OrderState::Waiting => progress.at(0, "waiting for the agent"),
            OrderState::Running { percent, note } => progress.at_with_left(percent, &note),
        }
        wait = POLL_MAX.min(progress.step());
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left < Duration::from_secs(1) {
                return Ok(None);
            }
            wait = wait.min(left);
        }
    }
}

fn too_late(context: &Context, operator: &Operator, server: &str) -> Failure {
    let fuzzy = points::fetch(operator, server)
        .ok()
        .and_then(|points| points.points.into_iter().rfind(|p| p.consistency == "fuzzy"));
    let minutes = CUT_WAIT_MAX.as_secs() / 60;
    let what = match fuzzy {
        Some(point) => format!(
            "no exact point of {server} within {minutes} min; point {} ({}) is fuzzy: {}",
            point.id, point.time, point.reason
        ),
        None => format!("no point of {server} was committed within {minutes} min"),
    };
    Failure::new(Exit::TryLater, what)
        .still("the order stands; replication goes on")
        .hint(context.command(&format!("status {server}")))
}

fn table(volumes: &[VerifyResult]) -> String {
    let rows = volumes.iter().map(|volume| {
        let outcome = if volume.differing_bytes == 0 {
            "equal".to_string()
        } else {
            let ranges: Vec<String> = volume
                .differing
                .iter()
                .take(RANGES_SHOWN)
                .map(|(offset, length)| format!("{offset}+{length}"))
                .collect();
            format!(
                "{} differ, at bytes {}",
                units::bytes(volume.differing_bytes),
                ranges.join(" ")
            )
        };
        vec![volume.name.clone(), units::bytes(volume.compared_bytes), outcome]
    });
    output::table(&["VOLUME", "COMPARED", "RESULT"], rows.collect())
}
