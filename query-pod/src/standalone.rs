//! Standalone mode: the catalog is compiled here, from a folder of manifests.
//!
//! A broken manifest is reported with file, line and field, and changes nothing: every object that was good before is
//! served as it was. A manifest that is gone unregisters its object and removes no data.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kalamdb_crds::manifests::{self, Folder};
use kalamdb_model::{Catalog, OnRemoval, compile};
use kalamdb_table_store::store::Credentials;
use kalamdb_table_store::{FilesystemStore, catalog_log};

use crate::args::Standalone;
use crate::auth::Tokens;
use crate::catalog::CatalogHandle;
use crate::engine::{Engine, Secrets};
use crate::error::Chain;
use crate::server::{self, Parts};

/// How often the folder is looked at; the promise is one second.
const POLL: Duration = Duration::from_millis(300);
/// Largest manifest file, and most files: a folder is no database.
const FILE_BYTES_MAX: u64 = 4 << 20;
const FILES_MAX: usize = 10_000;

/// Runs a standalone server.
///
/// # Errors
/// If the data folder, the manifest folder or the address cannot be used.
pub async fn run(args: &Standalone) -> anyhow::Result<()> {
    let folder = args.manifests.clone();
    anyhow::ensure!(folder.is_dir(), "the manifest folder `{}` does not exist", folder.display());
    let parts = Parts::open(&args.server)?;
    let tokens = Tokens::of_data_dir(&args.server.data_dir)?;
    parts.engine.follow_users(Arc::new(FilesystemStore::open(&args.server.data_dir.join("home"))?));
    let mut watched = Watched::new(parts.catalog.clone(), Arc::clone(&parts.engine), parts.secrets.clone());
    watched.look(&folder);
    parts.ready.send_replace(true);
    let watching = tokio::spawn(async move {
        loop {
            tokio::time::sleep(POLL).await;
            watched.look(&folder);
        }
    });
    let served = server::serve(&args.server, parts, tokens).await;
    watching.abort();
    served
}

/// The folder as it was when last looked at.
struct Watched {
    catalog: CatalogHandle,
    engine: Arc<Engine>,
    secrets: Secrets,
    seen: Option<Vec<(String, String)>>,
    unreadable: bool,
}

impl Watched {
    const fn new(catalog: CatalogHandle, engine: Arc<Engine>, secrets: Secrets) -> Self {
        Self { catalog, engine, secrets, seen: None, unreadable: false }
    }

    /// Serves what the folder says now, if that has changed.
    fn look(&mut self, folder: &Path) {
        let files = match read(folder) {
            Ok(files) => files,
            Err(error) => {
                if !std::mem::replace(&mut self.unreadable, true) {
                    tracing::error!(error = %format!("{error:#}"), "cannot read the manifests; serving what was served");
                }
                return;
            }
        };
        self.unreadable = false;
        if self.seen.as_ref() == Some(&files) {
            return;
        }
        if self.apply(&manifests::folder(&files)) {
            self.seen = Some(files);
        }
    }

    /// Whether the folder need not be looked at again as it is.
    fn apply(&self, folder: &Folder) -> bool {
        for problem in &folder.problems {
            tracing::error!(error = %problem, "a manifest is broken; what was good before is served on");
        }
        if folder.incomplete {
            return true;
        }
        let secrets: HashMap<String, Credentials> = folder
            .secrets
            .iter()
            .map(|(name, secret)| (name.clone(), Credentials::new(secret.values.clone())))
            .collect();
        self.secrets.replace(secrets);
        let current = self.catalog.current();
        let (next, outcomes) = compile(&current.catalog, &folder.declared, OnRemoval::Retain);
        for outcome in &outcomes {
            // Objects with problems of their own were reported with them.
            let broken = folder.declared.iter().any(|d| d.object == outcome.object && d.spec.is_err());
            if let (Err(refusal), false) = (&outcome.verdict, broken) {
                let place = folder.problem(&outcome.object, &refusal.message);
                let shown = place.map_or_else(|| refusal.message.clone(), |problem| problem.to_string());
                tracing::error!(error = %shown, reason = refusal.reason.as_str(), "an object is refused");
            }
            for warning in &outcome.warnings {
                tracing::warn!(object = %outcome.object.name, warning, "an object may not do what it seems to");
            }
        }
        if next.version == current.catalog.version {
            return true;
        }
        let (version, tables) = (next.version, next.tables.len());
        match self.engine.serve_catalog(Catalog { nonce: catalog_log::nonce(), ..next }) {
            Ok(()) => {
                tracing::info!(version, tables, "serving a new catalog");
                true
            }
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot save the catalog; serving the one before");
                false
            }
        }
    }
}

fn read(folder: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("failed to list `{}`", folder.display()))? {
        let path = entry?.path();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if !is_yaml || !path.is_file() {
            continue;
        }
        anyhow::ensure!(files.len() < FILES_MAX, "more than {FILES_MAX} manifests in `{}`", folder.display());
        let size = path.metadata()?.len();
        anyhow::ensure!(
            size <= FILE_BYTES_MAX,
            "`{}` has {size} bytes, at most {FILE_BYTES_MAX} are read",
            path.display()
        );
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
        files.push((name, text));
    }
    files.sort();
    Ok(files)
}
