//! What a target shows.

use super::{Page, flag, seconds, seconds_of_ns};
use crate::target::{Observation, VolumeObservation};
use jiff::Timestamp;

/// What the daemon knows besides its data plane.
#[derive(Debug, Clone)]
pub struct Target {
    /// The data plane.
    pub target: Observation,
    /// End of the certificate.
    pub certificate_ends: Timestamp,
    /// Whether control answers.
    pub control_answers: bool,
}

/// The text of a scrape.
pub fn render(all: &Target) -> String {
    let target = &all.target;
    let mut page = Page::of("target");
    page.gauge(
        "secondsite_target_certificate_expiry_timestamp_seconds",
        "When the target's certificate ends; it renews itself from a third of its life on",
        seconds(all.certificate_ends),
    );
    page.gauge(
        "secondsite_target_control_answers",
        "Whether control answered the last question; replication goes on without",
        flag(all.control_answers),
    );
    page.gauge(
        "secondsite_target_store_free_bytes",
        "Free space of the store's file system",
        target.free_bytes.map(|bytes| bytes as f64),
    );
    page.gauge(
        "secondsite_target_store_reserve_bytes",
        "Of it, what is never used",
        target.reserve_bytes as f64,
    );
    page.gauge(
        "secondsite_target_store_promised_bytes",
        "Of it, what promotion of the journals may still write",
        target.promised_bytes as f64,
    );
    page.gauge(
        "secondsite_target_memory_limit_bytes",
        "Memory for frames on their way",
        target.memory_bytes as f64,
    );
    page.gauge(
        "secondsite_target_memory_used_bytes",
        "Of it, what holds frames now",
        target.memory_used_bytes as f64,
    );
    page.counter(
        "secondsite_target_handshake_failures",
        "Connections that did not show a certificate of an agent of this deployment",
        target.handshake_failures,
    );
    page.counters(
        "secondsite_target_refused_sessions",
        "Sessions refused or ended with a refusal, by its code",
        target.refusals.iter().map(|(code, count)| (vec![("code", (*code).into())], *count)),
    );
    volumes(&mut page, &target.volumes);
    page.text()
}

fn volumes(page: &mut Page, volumes: &[VolumeObservation]) {
    let label = |volume: &VolumeObservation| {
        vec![("server", volume.server.clone()), ("volume", volume.volume.clone())]
    };
    let mut gauge = |name, help, of: fn(&VolumeObservation) -> f64| {
        page.gauges(name, help, volumes.iter().map(|volume| (label(volume), of(volume))));
    };
    gauge("secondsite_target_volume_connected", "Whether its agent is connected", |volume| {
        flag(volume.connected)
    });
    gauge(
        "secondsite_target_volume_stopped",
        "1 if it cannot go on here: its storage failed, or cannot be opened",
        |volume| flag(volume.stopped),
    );
    gauge("secondsite_target_volume_copied", "Whether the first copy is complete", |volume| {
        flag(volume.copied)
    });
    gauge("secondsite_target_volume_journal_bytes", "Bytes of its journal", |volume| {
        volume.journal_bytes as f64
    });
    let mut time = |name, help, of: fn(&VolumeObservation) -> Option<u64>| {
        let row = |volume| Some((label(volume), seconds_of_ns(of(volume)?)));
        page.gauges(name, help, volumes.iter().filter_map(row));
    };
    time(
        "secondsite_target_volume_committed_point_timestamp_seconds",
        "When the newest committed point was cut, by the agent's clock",
        |volume| volume.committed_ns,
    );
    time(
        "secondsite_target_volume_replica_point_timestamp_seconds",
        "When the point was cut that the replica volume equals",
        |volume| volume.replica_ns,
    );
    let mut count = |name, help, of: fn(&VolumeObservation) -> u64| {
        page.counters(name, help, volumes.iter().map(|volume| (label(volume), of(volume))));
    };
    count("secondsite_target_volume_commits", "Epochs committed", |volume| volume.commits);
    count("secondsite_target_volume_promotions", "Promotions into the replica volume", |volume| {
        volume.promotions
    });
    count("secondsite_target_volume_received_bytes", "Bytes of frames received", |volume| {
        volume.received_bytes
    });
}
