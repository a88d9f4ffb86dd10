//! Answers byte ranges of Parquet files from memory and disk first.
//!
//! Owns: the one place where a cache stands between readers and object storage. Does not own: stores (`table_store`
//! opens them) or decoded footers (the query pod keeps those).
//!
//! Files are immutable and have unique names, so a cached byte is never stale, and losing the cache in a crash costs
//! only time. Today the layer passes every request through; a cache on foyer comes behind the same function.

use std::sync::Arc;

use object_store::ObjectStore;

/// Puts the cache in front of `store`. Every read of Parquet files goes through the result; writes may.
#[must_use]
pub fn layer(store: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
    store
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;
    use object_store::path::Path;

    use super::*;

    #[tokio::test]
    async fn what_is_written_below_is_read_through_the_layer() -> object_store::Result<()> {
        let below: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let path = Path::from("users/a/file.parquet");
        below.put(&path, "PAR1".into()).await?;
        assert_eq!(layer(below).get_range(&path, 0..4).await?, "PAR1");
        Ok(())
    }
}
