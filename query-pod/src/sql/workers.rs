//! Threads that run queries and nothing else.
//!
//! A query gives its thread back only between two batches, and some take minutes for one (a join of everything with
//! everything that finds nothing). On threads of their own, such queries are late for each other, and for nobody else:
//! requests are taken, writes are acknowledged, and the query's timeout is answered in time.

use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;

/// Stack of a thread: plans are as deep as statements may be.
const STACK_BYTES: usize = 8 << 20;

/// The threads.
pub(super) struct Workers(Option<Runtime>);

impl Workers {
    /// As many threads as the machine has processors, at least two.
    pub(super) fn new() -> std::io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(2);
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("query")
            .thread_stack_size(STACK_BYTES)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    /// Runs `work` on these threads. Dropping this stops the work where it next waits.
    ///
    /// # Errors
    /// If it panics.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        let runtime = self.0.as_ref().expect("the threads live as long as this");
        AbortOnDropHandle::new(runtime.spawn(work)).await
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Waiting for them is not possible here, inside of another runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
