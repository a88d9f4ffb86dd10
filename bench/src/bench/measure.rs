//! Many clients doing one thing for a while, and how long each time took.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;

/// Bounds of one measurement: whichever comes first.
#[derive(Clone, Copy)]
pub struct Bounds {
    /// Clients at once.
    pub clients: u32,
    /// How long new operations are begun.
    pub duration: Duration,
    /// Most operations of each client.
    pub operations_max: u64,
}

/// What was measured.
pub struct Measured {
    latencies_us: Histogram<u64>,
    elapsed: Duration,
}

impl Measured {
    /// Operations done.
    pub fn operations(&self) -> u64 {
        self.latencies_us.len()
    }

    /// Operations per second.
    #[expect(clippy::cast_precision_loss, reason = "shown with few digits")]
    pub fn per_second(&self) -> f64 {
        self.operations() as f64 / self.elapsed.as_secs_f64().max(f64::EPSILON)
    }

    /// The latency, in milliseconds, that a `quantile` of all operations kept to.
    #[expect(clippy::cast_precision_loss, reason = "shown with few digits")]
    pub fn millis_at(&self, quantile: f64) -> f64 {
        self.latencies_us.value_at_quantile(quantile) as f64 / 1_000.0
    }
}

/// Lets every client repeat `operation(client, turn)` within `bounds`.
///
/// # Errors
/// The first error of an operation; the others end with it.
pub async fn repeat<F>(
    bounds: Bounds,
    operation: impl Fn(u32, u64) -> F + Clone + Send + 'static,
) -> anyhow::Result<Measured>
where
    F: Future<Output = anyhow::Result<()>> + Send,
{
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..bounds.clients {
        let operation = operation.clone();
        clients.spawn(async move {
            let mut latencies_us = histogram()?;
            for turn in 0..bounds.operations_max {
                if started.elapsed() >= bounds.duration {
                    break;
                }
                let begun = Instant::now();
                operation(client, turn).await?;
                latencies_us.saturating_record(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
            anyhow::Ok(latencies_us)
        });
    }
    let mut latencies_us = histogram()?;
    while let Some(client) = clients.join_next().await {
        latencies_us.add(client.context("a client broke off")??)?;
    }
    Ok(Measured { latencies_us, elapsed: started.elapsed() })
}

/// 1 µs to 5 minutes with three digits.
fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 300_000_000, 3).context("failed to make a histogram")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_measurement_ends_at_its_count_or_its_time() {
        let counted = Bounds { clients: 3, duration: Duration::from_secs(60), operations_max: 4 };
        assert_eq!(repeat(counted, |_, _| async { Ok(()) }).await.unwrap().operations(), 12);
        let timed = Bounds { clients: 1, duration: Duration::from_millis(200), operations_max: u64::MAX };
        let sleep = |_, _| async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok(())
        };
        let measured = repeat(timed, sleep).await.unwrap();
        assert!((1..=40).contains(&measured.operations()));
        assert!(measured.millis_at(0.5) >= 5.0);
    }

    #[tokio::test]
    async fn an_error_ends_a_measurement() {
        let bounds = Bounds { clients: 2, duration: Duration::from_secs(60), operations_max: 10 };
        assert!(
            repeat(bounds, |client, _| async move {
                anyhow::ensure!(client == 0);
                Ok(())
            })
            .await
            .is_err()
        );
    }
}
