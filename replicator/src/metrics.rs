//! Metrics of a daemon in OpenMetrics text, for who asks its socket.
//!
//! A scrape is answered by a thread of its own, one at a time, from snapshots and counters that the
//! daemon keeps anyway: it takes no lock that is held over I/O, and nothing of the data path waits
//! for it. Times are timestamps, never ages; units are bytes and seconds. Labels are names of
//! volumes and servers, and words of fixed sets: so there are as many series as somebody protects
//! volumes. docs/metrics.md lists all, and a test holds it to that.

pub mod agent;
pub mod control;
mod serve;
pub mod target;

pub use serve::{Sockets, serve};

use jiff::Timestamp;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;

/// What tells the rows of a metric apart.
type Labels = Vec<(&'static str, String)>;

/// One answer, made anew for each scrape.
#[derive(Debug, Default)]
pub(crate) struct Page {
    registry: Registry,
}

impl Page {
    /// With what every daemon says of itself.
    fn of(role: &'static str) -> Self {
        let mut page = Self::default();
        let version = vec![("role", role.into()), ("version", env!("CARGO_PKG_VERSION").into())];
        page.gauges("secondsite_build_info", "Always 1; labels say what runs", [(version, 1.0)]);
        page
    }

    /// A gauge; without rows it is left out.
    fn gauges(
        &mut self,
        name: &'static str,
        help: &'static str,
        rows: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in rows {
            family.get_or_create(&labels).set(value);
        }
        self.registry.register(name, help, family);
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, value: impl Into<Option<f64>>) {
        self.gauges(name, help, value.into().map(|value| (Labels::new(), value)));
    }

    /// A counter; its name gets `_total`.
    fn counters(
        &mut self,
        name: &'static str,
        help: &'static str,
        rows: impl IntoIterator<Item = (Labels, u64)>,
    ) {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in rows {
            family.get_or_create(&labels).inc_by(value);
        }
        self.registry.register(name, help, family);
    }

    fn counter(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.counters(name, help, [(Labels::new(), value)]);
    }

    fn histogram(&mut self, name: &'static str, help: &'static str, histogram: &Histogram) {
        self.registry.register(name, help, histogram.clone());
    }

    /// The text.
    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// 1 or 0.
fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// Seconds since 1970.
fn seconds(time: Timestamp) -> f64 {
    time.as_nanosecond() as f64 / 1e9
}

/// Nanoseconds since 1970, as seconds.
fn seconds_of_ns(ns: u64) -> f64 {
    ns as f64 / 1e9
}
