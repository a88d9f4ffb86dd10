//! Counts what foyer drops on its way to the disk. It tells that to a metrics registry only; this one hears nothing else.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mixtrics::metrics::{
    BoxedCounter, BoxedCounterVec, BoxedGauge, BoxedGaugeVec, BoxedHistogram, BoxedHistogramVec, CounterOps,
    CounterVecOps, GaugeOps, GaugeVecOps, HistogramOps, HistogramVecOps, RegistryOps,
};

/// The counter of foyer that has an `op` for each of [`OPS`].
const COUNTER: &str = "foyer_storage_inner_op_total";
/// The queue to the disk was full, or its buffer.
const OPS: [&str; 2] = ["channel_overflow", "buffer_overflow"];

#[derive(Clone, Debug, Default)]
pub(crate) struct Dropped(Arc<AtomicU64>);

impl Dropped {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A metric that nobody reads.
#[derive(Debug)]
struct Unread;

impl CounterOps for Dropped {
    fn increase(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
}

impl CounterVecOps for Dropped {
    fn counter(&self, labels: &[Cow<'static, str>]) -> BoxedCounter {
        let is_drop = labels.iter().any(|label| OPS.contains(&label.as_ref()));
        if is_drop { Box::new(self.clone()) } else { Box::new(Unread) }
    }
}

impl RegistryOps for Dropped {
    fn register_counter_vec(
        &self,
        name: Cow<'static, str>,
        _: Cow<'static, str>,
        _: &'static [&'static str],
    ) -> BoxedCounterVec {
        if name == COUNTER { Box::new(self.clone()) } else { Box::new(Unread) }
    }

    fn register_gauge_vec(
        &self,
        _: Cow<'static, str>,
        _: Cow<'static, str>,
        _: &'static [&'static str],
    ) -> BoxedGaugeVec {
        Box::new(Unread)
    }

    fn register_histogram_vec(
        &self,
        _: Cow<'static, str>,
        _: Cow<'static, str>,
        _: &'static [&'static str],
    ) -> BoxedHistogramVec {
        Box::new(Unread)
    }

    fn register_histogram_vec_with_buckets(
        &self,
        _: Cow<'static, str>,
        _: Cow<'static, str>,
        _: &'static [&'static str],
        _: Vec<f64>,
    ) -> BoxedHistogramVec {
        Box::new(Unread)
    }
}

impl CounterOps for Unread {
    fn increase(&self, _: u64) {}
}

impl GaugeOps for Unread {
    fn increase(&self, _: u64) {}
    fn decrease(&self, _: u64) {}
    fn absolute(&self, _: u64) {}
}

impl HistogramOps for Unread {
    fn record(&self, _: f64) {}
}

impl CounterVecOps for Unread {
    fn counter(&self, _: &[Cow<'static, str>]) -> BoxedCounter {
        Box::new(Self)
    }
}

impl GaugeVecOps for Unread {
    fn gauge(&self, _: &[Cow<'static, str>]) -> BoxedGauge {
        Box::new(Self)
    }
}

impl HistogramVecOps for Unread {
    fn histogram(&self, _: &[Cow<'static, str>]) -> BoxedHistogram {
        Box::new(Self)
    }
}
