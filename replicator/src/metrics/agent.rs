//! What an agent shows.

use super::{Page, flag, seconds, seconds_of_ns};
use crate::source::{Observation, VolumeObservation};
use jiff::Timestamp;
use secondsite_control::api::VolumePhase;

/// The phases and their words.
const PHASES: [(VolumePhase, &str); 5] = [
    (VolumePhase::Connecting, "connecting"),
    (VolumePhase::FirstCopy, "first_copy"),
    (VolumePhase::Comparing, "comparing"),
    (VolumePhase::Following, "following"),
    (VolumePhase::Stopped, "stopped"),
];

/// What the daemon knows besides its data plane.
#[derive(Debug, Clone)]
pub struct Agent {
    /// None if it stands still (another machine than the enrolled one).
    pub source: Option<Observation>,
    /// Assigned volumes that are not opened, since they were never offered or are not allowed.
    pub refused: usize,
    /// End of the certificate.
    pub certificate_ends: Timestamp,
    /// Whether control answers.
    pub control_answers: bool,
}

/// The text of a scrape.
pub fn render(agent: &Agent) -> String {
    let mut page = Page::of("agent");
    page.gauge(
        "secondsite_agent_certificate_expiry_timestamp_seconds",
        "When the agent's certificate ends; it renews itself from a third of its life on",
        seconds(agent.certificate_ends),
    );
    page.gauge(
        "secondsite_agent_control_answers",
        "Whether control answered the last question; replication goes on without",
        flag(agent.control_answers),
    );
    page.gauge(
        "secondsite_agent_running",
        "0 if the agent stands still because this is not the machine that joined",
        flag(agent.source.is_some()),
    );
    page.gauge(
        "secondsite_agent_refused_volumes",
        "Assigned volumes that are not opened: never offered, or not in the allow list",
        agent.refused as f64,
    );
    let Some(source) = &agent.source else { return page.text() };
    page.gauge(
        "secondsite_agent_memory_limit_bytes",
        "Memory for blocks on their way",
        source.memory_bytes as f64,
    );
    page.gauge(
        "secondsite_agent_memory_used_bytes",
        "Of it, what holds blocks now",
        source.memory_used_bytes as f64,
    );
    page.histogram(
        "secondsite_agent_freeze_duration_seconds",
        "How long file systems were frozen for a cut",
        &source.freezes.durations,
    );
    page.counter(
        "secondsite_agent_freeze_failures",
        "Freezes that failed, or ended before the cut was made",
        source.freezes.failures(),
    );
    volumes(&mut page, &source.volumes);
    page.text()
}

fn volumes(page: &mut Page, volumes: &[VolumeObservation]) {
    let label = |volume: &VolumeObservation| vec![("volume", volume.name.clone())];
    let phases = volumes.iter().flat_map(|volume| {
        PHASES.iter().map(move |(phase, word)| {
            let labels = vec![("volume", volume.name.clone()), ("phase", (*word).into())];
            (labels, flag(volume.status.phase == *phase))
        })
    });
    page.gauges("secondsite_agent_volume_phase", "1 for what the volume is doing", phases);
    page.gauges(
        "secondsite_agent_volume_tracked",
        "1 if eBPF follows its writes, 0 if it is only compared or not open",
        volumes.iter().map(|volume| (label(volume), flag(volume.status.tracker == "ebpf"))),
    );
    page.gauges(
        "secondsite_agent_volume_size_bytes",
        "Size of the volume",
        volumes.iter().map(|volume| (label(volume), volume.size_bytes as f64)),
    );
    page.gauges(
        "secondsite_agent_volume_backlog_bytes",
        "Bytes not yet committed at the target",
        volumes.iter().map(|volume| (label(volume), volume.backlog_bytes as f64)),
    );
    let time = |at: fn(&VolumeObservation) -> u64| {
        let row = move |volume: &VolumeObservation| {
            let ns = at(volume);
            (ns > 0).then(|| (label(volume), seconds_of_ns(ns)))
        };
        volumes.iter().filter_map(row)
    };
    page.gauges(
        "secondsite_agent_volume_newest_point_timestamp_seconds",
        "When the newest point was cut that was committed since the agent started",
        time(|volume| volume.status.newest_point_ns),
    );
    page.gauges(
        "secondsite_agent_volume_newest_exact_point_timestamp_seconds",
        "The same of the newest exact point",
        time(|volume| volume.status.newest_exact_ns),
    );
    let points = volumes.iter().flat_map(|volume| {
        let status = &volume.status;
        [("exact", status.points_exact), ("fuzzy", status.points_fuzzy)].map(|(kind, count)| {
            (vec![("volume", volume.name.clone()), ("consistency", kind.into())], count)
        })
    });
    page.counters("secondsite_agent_volume_points", "Points committed", points);
    let mut count = |name, help, of: fn(&VolumeObservation) -> u64| {
        page.counters(name, help, volumes.iter().map(|volume| (label(volume), of(volume))));
    };
    count("secondsite_agent_volume_read_bytes", "Bytes read from the volume", |volume| {
        volume.read_bytes
    });
    count("secondsite_agent_volume_sent_bytes", "Bytes sent to the target", |volume| {
        volume.status.sent_bytes
    });
    count(
        "secondsite_agent_volume_compares",
        "Compares that a doubt about the tracker made necessary",
        |volume| volume.status.compares,
    );
    count(
        "secondsite_agent_volume_give_ups",
        "Epochs given up; what they held goes with the next",
        |volume| volume.status.give_ups_total,
    );
    count(
        "secondsite_agent_volume_audit_gaps",
        "Times the tracker was found to have missed writes; a compare follows each",
        |volume| volume.status.audit_gaps,
    );
}
