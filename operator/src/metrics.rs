//! What the operator counts. Labels come from closed sets; never an object's name.

use kalamdb_model::declared::Kind;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// What can fail.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
pub enum Failure {
    /// Watching a kind.
    Watch,
    /// Reading the catalog log.
    LogRead,
    /// Appending to the catalog log.
    LogAppend,
    /// Writing a status.
    Status,
    /// Publishing an event.
    Event,
    /// Reading a Secret.
    Secret,
    /// Probing a storage.
    Probe,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FailureLabel {
    what: Failure,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ObjectLabel {
    kind: &'static str,
    ready: &'static str,
}

/// All kinds, in the order in which they depend on one another.
pub const KINDS: [Kind; 5] = [Kind::Storage, Kind::Namespace, Kind::ReplicaNode, Kind::UserTable, Kind::SharedTable];
const READY: [&str; 3] = ["True", "False", "Unknown"];

/// All metrics.
pub struct Metrics {
    registry: Registry,
    /// Seconds per pass.
    pub pass_seconds: Histogram,
    /// Version of the newest catalog that is in the log.
    pub catalog_version: Gauge,
    /// Statuses written.
    pub status_writes: Counter,
    objects: Family<ObjectLabel, Gauge>,
    failures: Family<FailureLabel, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("kalamdb_operator");
        let pass_seconds = Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let (catalog_version, status_writes) = (Gauge::default(), Counter::default());
        let objects = Family::<ObjectLabel, Gauge>::default();
        let failures = Family::<FailureLabel, Counter>::default();
        registry.register("pass_seconds", "Seconds per pass; its count is the number of passes", pass_seconds.clone());
        registry.register("catalog_version", "Version of the newest catalog in the log", catalog_version.clone());
        registry.register("status_writes", "Statuses written", status_writes.clone());
        registry.register("objects", "Objects by kind and by their condition Ready", objects.clone());
        registry.register("failures", "Failed calls by what they were for", failures.clone());
        Self { registry, pass_seconds, catalog_version, status_writes, objects, failures }
    }
}

impl Metrics {
    /// Counts a failure.
    pub fn failed(&self, what: Failure) {
        self.failures.get_or_create(&FailureLabel { what }).inc();
    }

    /// Sets the numbers of objects from all that there are, each with the status of its condition Ready.
    pub fn count_objects(&self, all: impl Iterator<Item = (Kind, &'static str)> + Clone) {
        for kind in KINDS {
            for ready in READY {
                let count = all.clone().filter(|found| *found == (kind, ready)).count();
                let label = ObjectLabel { kind: kind.as_str(), ready };
                self.objects.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
    }

    /// All metrics as text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_objects_and_failures_by_closed_labels() {
        let metrics = Metrics::default();
        metrics.failed(Failure::LogAppend);
        metrics.count_objects([(Kind::Storage, "True"), (Kind::Storage, "True")].into_iter());
        let text = metrics.text();
        assert!(text.contains(r#"kalamdb_operator_objects{kind="Storage",ready="True"} 2"#), "{text}");
        assert!(text.contains(r#"kalamdb_operator_objects{kind="UserTable",ready="False"} 0"#), "{text}");
        assert!(text.contains(r#"kalamdb_operator_failures_total{what="LogAppend"} 1"#), "{text}");
    }
}
