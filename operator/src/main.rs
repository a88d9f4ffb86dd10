//! `kalamdb-operator`: see [`kalamdb_operator`].

use std::hash::{BuildHasher as _, Hasher as _};
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Parser as _;
use kalamdb_operator::args::Args;
use kalamdb_operator::cluster::Cluster;
use kalamdb_operator::metrics::{KINDS, Metrics};
use kalamdb_operator::pass::{self, Parts};
use kalamdb_operator::storages::Storages;
use kalamdb_operator::watch::{Objects, follow};
use kalamdb_operator::{cluster, serve};
use kalamdb_table_store::open_home;
use tokio::sync::watch;

/// Time to end after SIGTERM, the 8 s for the pass under way included; pods have 30 s.
const STOP_GRACE: Duration = Duration::from_secs(20);

fn main() -> anyhow::Result<ExitCode> {
    // One provider for all of TLS, before the first connection: rustls panics when it has to guess.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let on_terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(on_terminal).init();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(Box::pin(run(args)))
}

/// Shutdown order: no new pass, the pass under way ends, watches end.
async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let home = open_home(&args.home_url, |name| std::env::var(name).ok()).context("KALAMDB_HOME_URL")?;
    let client = kube::Client::try_default().await.context("failed to find out how to reach the Kubernetes API")?;
    let namespace = args.namespace(client.default_namespace())?;
    let writer = writer();
    tracing::info!(kube_namespace = %namespace, writer, "starting");

    let (metrics, objects, storages) =
        (Arc::new(Metrics::default()), Arc::new(Objects::default()), Storages::default());
    let cluster = Cluster::new(client, namespace, pod_name());
    let (waiting, is_waiting) = watch::channel(Some("its start".to_owned()));
    let (stop, stopping) = watch::channel(false);

    let pages = tokio::spawn(serve::listen(args.listen, Arc::clone(&metrics), is_waiting).await?);
    let watches =
        KINDS.map(|kind| tokio::spawn(follow(kind, cluster.api(kind), Arc::clone(&objects), Arc::clone(&metrics))));
    let checks = tokio::spawn(storages.clone().run(Arc::clone(&objects), cluster.clone(), Arc::clone(&metrics)));
    let mut passes =
        tokio::spawn(pass::run(Parts { objects, home, cluster, storages, metrics, writer }, waiting, stopping));

    let ended = tokio::select! {
        ended = &mut passes => Some(ended),
        () = stop_signal() => None,
    };
    tracing::info!("stopping");
    stop.send_replace(true);
    let outcome = match ended {
        Some(ended) => ended.context("the passes ended by our own fault").and_then(|ended| Ok(ended?)),
        None => match tokio::time::timeout(STOP_GRACE, passes).await {
            Ok(ended) => ended.context("the passes ended by our own fault").and_then(|ended| Ok(ended?)),
            Err(_) => {
                tracing::warn!("stopping although a pass is still under way; the next start finishes it");
                Ok(())
            }
        },
    };
    watches.iter().for_each(tokio::task::JoinHandle::abort);
    checks.abort();
    pages.abort();
    Ok(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %cluster::chain(error.as_ref()), "stepping down");
            ExitCode::FAILURE
        }
    })
}

fn pod_name() -> String {
    let name = std::env::var("POD_NAME").or_else(|_| std::env::var("HOSTNAME"));
    name.unwrap_or_else(|_| cluster::MANAGER.to_owned())
}

/// Our name in the catalog log. A restarted container has the same name and process id, hence the rest.
fn writer() -> String {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    // The standard library's only source of randomness.
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("{}/{nanos:x}-{random:016x}", pod_name())
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(error) => {
                tracing::error!(error = %error, "cannot listen for SIGTERM");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = terminate => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
