//! The stores that the suite runs on, each empty for each test.

use std::io::Write;
use std::path::Path as FsPath;
use std::sync::{Arc, Once};

use kalamdb_model::declared::StorageRoot;
use kalamdb_table_store::{Credentials, FilesystemStore, open};
use object_store::ObjectStore;

pub type Store = Arc<dyn ObjectStore>;

pub fn memory() -> Store {
    Arc::new(object_store::memory::InMemory::new())
}

pub fn filesystem() -> (Store, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Arc::new(FilesystemStore::open(folder.path()).unwrap()), folder)
}

static SAID: Once = Once::new();

/// A folder of its own in the bucket of the S3 server, if there is one.
pub fn s3(test: &str) -> Option<Store> {
    let variable = |name: &str| std::env::var(format!("KALAMDB_TEST_S3_{name}")).ok();
    let Some(endpoint) = variable("ENDPOINT") else {
        assert_ne!(std::env::var("KALAMDB_TEST_REQUIRE_S3").as_deref(), Ok("1"), "KALAMDB_TEST_S3_ENDPOINT is not set");
        // Past the test harness, which keeps what passing tests print.
        SAID.call_once(|| {
            drop(writeln!(std::io::stderr(), "the S3 tests did not run: KALAMDB_TEST_S3_ENDPOINT is not set"))
        });
        return None;
    };
    let needed = |name: &str| variable(name).unwrap_or_else(|| panic!("KALAMDB_TEST_S3_{name} is not set"));
    let root = StorageRoot::S3 {
        bucket: needed("BUCKET"),
        prefix: format!("it/{test}-{:016x}", rand::random::<u64>()),
        region: Some("us-east-1".to_owned()),
        endpoint: Some(endpoint),
        path_style: true,
        allow_http: true,
    };
    let keys = [("accessKeyId", needed("ACCESS_KEY")), ("secretAccessKey", needed("SECRET_KEY"))];
    let credentials = Credentials::new(keys.map(|(key, value)| (key.to_owned(), value)).into());
    Some(open(&root, Some(&credentials), FsPath::new("/")).unwrap())
}
