//! What a control server shows.

use super::{Page, flag, seconds, seconds_of_ns};
use secondsite_control::codes::State;
use secondsite_control::observed::{Observed, Snapshot};

/// The text of a scrape.
pub fn render(observed: &Observed, snapshot: &Snapshot) -> String {
    let mut page = Page::of("control");
    page.counters(
        "secondsite_control_requests",
        "Requests answered, by class of the answer",
        observed.answers().map(|(class, count)| (vec![("code", format!("{class}xx"))], count)),
    );
    let servers = &snapshot.servers;
    page.gauges(
        "secondsite_control_servers",
        "Servers in this state",
        State::ALL.iter().map(|state| {
            let count = servers.iter().filter(|server| server.state == *state).count();
            (vec![("state", state.code().to_owned())], count as f64)
        }),
    );
    let label = |name: &str| vec![("server", name.to_owned())];
    page.gauges(
        "secondsite_control_server_inside_goal",
        "1 if the server is protected and its loss is inside its goal",
        servers.iter().map(|server| (label(&server.name), flag(server.state == State::Protected))),
    );
    page.gauges(
        "secondsite_control_server_goal_seconds",
        "The goal: how much may be lost, as time",
        servers.iter().map(|server| (label(&server.name), server.goal_seconds as f64)),
    );
    page.gauges(
        "secondsite_control_server_backlog_bytes",
        "Bytes not yet committed at the target, as the agent reported last",
        servers.iter().map(|server| (label(&server.name), server.backlog_bytes as f64)),
    );
    page.gauges(
        "secondsite_control_server_newest_exact_point_timestamp_seconds",
        "When the newest exact point was cut; what is newer would be lost",
        servers.iter().filter_map(|server| {
            Some((label(&server.name), seconds_of_ns(server.newest_exact_ns?)))
        }),
    );
    page.gauges(
        "secondsite_control_server_heard_timestamp_seconds",
        "When the agent reported last",
        servers.iter().filter_map(|server| Some((label(&server.name), seconds(server.heard?)))),
    );
    page.gauges(
        "secondsite_control_target_heard_timestamp_seconds",
        "When the target reported last",
        snapshot
            .targets
            .iter()
            .filter_map(|(name, heard)| Some((vec![("target", name.clone())], seconds((*heard)?)))),
    );
    page.gauges(
        "secondsite_control_certificate_expiry_timestamp_seconds",
        "When the newest certificate of this holder ends",
        snapshot.certificates.iter().map(|(role, name, ends)| {
            (vec![("role", role.clone()), ("name", name.clone())], seconds(*ends))
        }),
    );
    page.text()
}
