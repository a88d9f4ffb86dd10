//! Finds out which storages can be used: are the credentials there, and does the store take, keep and give back.
//!
//! Owns: when a storage is asked again, and what the answer means. Does not own: what it takes to ask
//! (`kalamdb_table_store::probe`), or how it is reported ([`crate::status`]).
//!
//! It runs beside the passes, because a store that does not answer must not hold up anybody's table. At most
//! [`CHECKS_MAX`] at a time; nothing is kept over a restart but what statuses say.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kalamdb_model::declared::{Kind, Spec, StorageRoot, StorageSpec};
use kalamdb_table_store::{Credentials, ProbeError, ProbeReason, StoreError, open, probe};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::backoff::Backoff;
use crate::cluster::{CallError, Cluster, chain};
use crate::metrics::{Failure, Metrics};
use crate::status::{Reach, Trouble};
use crate::watch::Objects;

/// Checks at the same time.
const CHECKS_MAX: usize = 4;
/// The whole probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// A storage that works is probed again after this.
const PROBE_EVERY: Duration = Duration::from_secs(300);
/// Secrets are read again after this: operators may not watch them without seeing all of the namespace's.
const SECRET_EVERY: Duration = Duration::from_secs(30);
/// Pauses of a storage that does not work.
const FAILING_FIRST: Duration = Duration::from_secs(5);
const FAILING_LONGEST: Duration = Duration::from_secs(300);
/// How often it is looked whether a check is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where a storage is and with which credentials: what a probe's answer depends on.
#[derive(Clone, PartialEq)]
struct Place {
    uid: String,
    root: StorageRoot,
    secret: Option<String>,
}

impl Place {
    fn of(uid: &str, spec: &StorageSpec) -> Self {
        Self { uid: uid.to_owned(), root: spec.root.clone(), secret: spec.credentials_secret.clone() }
    }
}

/// What is known of one storage.
#[derive(Clone)]
struct Checked {
    place: Place,
    /// What the last probe used, if it came to a probe.
    credentials: Option<Credentials>,
    reach: Reach,
    backoff: Backoff,
    probe_at: Instant,
    look_at: Instant,
}

impl Checked {
    fn new(place: Place, now: Instant) -> Self {
        let backoff = Backoff::new(FAILING_FIRST, FAILING_LONGEST);
        Self { place, credentials: None, reach: Reach::Probing, backoff, probe_at: now, look_at: now }
    }

    /// Notes an answer and plans the next question.
    fn answered(&mut self, reach: Reach, now: Instant) {
        let pause = if reach == Reach::Reachable {
            self.backoff.succeeded();
            PROBE_EVERY
        } else {
            self.backoff.failed()
        };
        self.reach = reach;
        self.probe_at = now + pause;
        self.look_again(now);
    }

    fn look_again(&mut self, now: Instant) {
        let secret = self.place.secret.as_ref().map(|_| now + SECRET_EVERY);
        self.look_at = secret.map_or(self.probe_at, |secret| secret.min(self.probe_at));
    }
}

/// What is known of all storages, by object name.
#[derive(Clone)]
pub struct Storages {
    known: Arc<Mutex<HashMap<String, Checked>>>,
    changes: watch::Sender<u64>,
}

impl Default for Storages {
    fn default() -> Self {
        Self { known: Arc::default(), changes: watch::Sender::new(0) }
    }
}

impl Storages {
    /// What is known of a storage as it is declared now.
    #[must_use]
    pub fn reach(&self, name: &str, uid: &str, spec: &StorageSpec) -> Reach {
        if matches!(spec.root, StorageRoot::Filesystem { .. }) {
            return Reach::NotProbed;
        }
        let known = self.known.lock();
        let found = known.get(name).filter(|checked| checked.place == Place::of(uid, spec));
        found.map_or(Reach::Probing, |checked| checked.reach.clone())
    }

    /// Counts changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The storage whose check is due for longest; those never checked go first. Forgets storages that are gone.
    fn due(&self, wanted: &HashMap<String, Place>, busy: &[String], now: Instant) -> Option<(String, Checked)> {
        let mut known = self.known.lock();
        known.retain(|name, checked| wanted.get(name) == Some(&checked.place));
        let waiting = wanted.iter().filter(|(name, _)| !busy.contains(name)).map(|(name, place)| {
            let checked = known.get(name).cloned();
            (checked.is_some(), name, checked.unwrap_or_else(|| Checked::new(place.clone(), now)))
        });
        let due = waiting.filter(|(_, _, checked)| checked.look_at <= now);
        let first = due.min_by_key(|(was_checked, name, checked)| (*was_checked, checked.look_at, *name));
        first.map(|(_, name, checked)| (name.clone(), checked))
    }

    fn note(&self, name: String, checked: Checked) {
        let mut known = self.known.lock();
        let before = known.insert(name, checked.clone());
        if before.is_none_or(|before| before.reach != checked.reach || before.place != checked.place) {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Checks storages for ever, as they are declared.
    pub async fn run(self, objects: Arc<Objects>, cluster: Cluster, metrics: Arc<Metrics>) {
        let mut changes = objects.changes();
        let mut checks: JoinSet<(String, Checked)> = JoinSet::new();
        let mut busy: Vec<String> = Vec::new();
        loop {
            let wanted = declared(&objects);
            while busy.len() < CHECKS_MAX {
                let Some((name, checked)) = self.due(&wanted, &busy, Instant::now()) else { break };
                busy.push(name.clone());
                let (cluster, metrics) = (cluster.clone(), Arc::clone(&metrics));
                checks.spawn(async move { (name, check(checked, &cluster, &metrics).await) });
            }
            tokio::select! {
                Some(done) = checks.join_next() => match done {
                    Ok((name, checked)) => {
                        busy.retain(|other| *other != name);
                        self.note(name, checked);
                    }
                    Err(error) => {
                        // Which check it was is lost with it: all run again.
                        tracing::error!(error = %error, "a check of a storage ended by our own fault");
                        checks.abort_all();
                        while checks.join_next().await.is_some() {}
                        busy.clear();
                        tokio::time::sleep(FAILING_FIRST).await;
                    }
                },
                _ = changes.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}

fn declared(objects: &Objects) -> HashMap<String, Place> {
    let storages = objects.of(Kind::Storage);
    let places = storages.iter().filter_map(|seen| match &seen.declared.spec {
        Ok(Spec::Storage(spec)) if !matches!(spec.root, StorageRoot::Filesystem { .. }) => {
            Some((seen.object().name.clone(), Place::of(&seen.object().uid, spec)))
        }
        _ => None,
    });
    places.collect()
}

async fn check(mut checked: Checked, cluster: &Cluster, metrics: &Metrics) -> Checked {
    let credentials = match checked.place.secret.clone() {
        None => None,
        Some(name) => match cluster.secret(&name).await {
            Ok(Some(data)) => Some(Credentials::new(data)),
            Ok(None) => {
                let message = format!("secret `{name}` not found in namespace `{}`", cluster.namespace());
                return missing(checked, message);
            }
            Err(error) => {
                metrics.failed(Failure::Secret);
                return unread(checked, &name, cluster.namespace(), &error);
            }
        },
    };
    let now = Instant::now();
    if credentials == checked.credentials && now < checked.probe_at && checked.reach != Reach::Probing {
        if checked.reach == Reach::Reachable {
            checked.backoff.succeeded();
        }
        checked.look_again(now);
        return checked;
    }
    let reach = ask(&checked.place, credentials.as_ref(), metrics).await;
    checked.credentials = credentials;
    checked.answered(reach, Instant::now());
    checked
}

fn missing(mut checked: Checked, message: String) -> Checked {
    checked.credentials = None;
    let message = format!("{}: {message}", secret_field(&checked.place.root));
    checked.answered(Reach::Unreachable { trouble: Trouble::CredentialsMissing, message }, Instant::now());
    checked
}

/// An API server that cannot be asked says nothing about the storage; one that forbids it does.
fn unread(mut checked: Checked, name: &str, namespace: &str, error: &CallError) -> Checked {
    tracing::warn!(secret = %name, error = %chain(error), "cannot read a secret");
    if error.is_forbidden() {
        return missing(checked, format!("the operator may not read secret `{name}` in namespace `{namespace}`"));
    }
    checked.look_at = Instant::now() + checked.backoff.failed();
    checked
}

async fn ask(place: &Place, credentials: Option<&Credentials>, metrics: &Metrics) -> Reach {
    let url = place.root.url();
    let store = match open(&place.root, credentials, Path::new("/")) {
        Ok(store) => store,
        Err(error @ StoreError::Credentials { .. }) => {
            let secret = place.secret.as_deref().unwrap_or_default();
            let message = format!("{}: secret `{secret}`: {error}", secret_field(&place.root));
            return Reach::Unreachable { trouble: Trouble::CredentialsMissing, message };
        }
        Err(error) => {
            tracing::warn!(storage = %url, error = %chain(&error), "a storage cannot be opened");
            return Reach::Unreachable { trouble: Trouble::Unavailable, message: error.to_string() };
        }
    };
    let answer = tokio::time::timeout(PROBE_TIMEOUT, probe(store.as_ref())).await;
    if let Ok(Ok(())) = answer {
        return Reach::Reachable;
    }
    metrics.failed(Failure::Probe);
    let error = answer.ok().and_then(Result::err);
    match &error {
        Some(error) => tracing::warn!(storage = %url, error = %chain(error), "a storage cannot be used"),
        None => tracing::warn!(storage = %url, "a storage does not answer"),
    }
    trouble(place, error.as_ref())
}

/// The message must be the same each time, or each probe would write a status: it leaves out what the store said.
fn trouble(place: &Place, error: Option<&ProbeError>) -> Reach {
    let url = place.root.url();
    let who = place.secret.as_ref().map_or("the pods' own identity".to_owned(), |name| format!("secret `{name}`"));
    let timeout = || (Trouble::Timeout, format!("`{url}` does not answer; check its endpoint and the network"));
    let (trouble, message) = match error.map(|error| (error.reason, error)) {
        None | Some((ProbeReason::Timeout, _)) => timeout(),
        Some((ProbeReason::AccessDenied, error)) => {
            (Trouble::AccessDenied, format!("{error} at `{url}`: access denied; check {who} and what it may do there"))
        }
        Some((ProbeReason::NotFound, _)) => {
            (Trouble::NotFound, format!("`{url}` was not found; create it, or check {who}"))
        }
        Some((ProbeReason::Other, error)) => {
            (Trouble::Unavailable, format!("{error} at `{url}`; the operator's log has the cause"))
        }
    };
    Reach::Unreachable { trouble, message }
}

const fn secret_field(root: &StorageRoot) -> &'static str {
    match root {
        StorageRoot::Filesystem { .. } => "spec.filesystem",
        StorageRoot::S3 { .. } => "spec.s3.credentialsSecret",
        StorageRoot::Gcs { .. } => "spec.gcs.credentialsSecret",
        StorageRoot::Azure { .. } => "spec.azure.credentialsSecret",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(bucket: &str, secret: Option<&str>) -> Place {
        let root = StorageRoot::S3 {
            bucket: bucket.to_owned(),
            prefix: String::new(),
            region: None,
            endpoint: None,
            path_style: false,
            allow_http: false,
        };
        Place { uid: "u".to_owned(), root, secret: secret.map(str::to_owned) }
    }

    fn timeout() -> Reach {
        trouble(&place("bucket", None), None)
    }

    #[test]
    fn a_storage_that_works_is_probed_every_five_minutes_and_one_that_fails_more_often_at_first() {
        let now = Instant::now();
        let mut checked = Checked::new(place("bucket", None), now);
        checked.answered(Reach::Reachable, now);
        assert_eq!(checked.look_at, now + PROBE_EVERY);
        let pauses = [5, 10, 20].map(|_| {
            checked.answered(timeout(), now);
            (checked.look_at - now).as_secs()
        });
        assert_eq!(pauses, [5, 10, 20]);
        checked.answered(Reach::Reachable, now);
        checked.answered(timeout(), now);
        assert_eq!(checked.look_at, now + FAILING_FIRST);
    }

    #[test]
    fn a_secret_is_read_again_before_the_next_probe() {
        let now = Instant::now();
        let mut checked = Checked::new(place("bucket", Some("creds")), now);
        checked.answered(Reach::Reachable, now);
        assert_eq!((checked.look_at, checked.probe_at), (now + SECRET_EVERY, now + PROBE_EVERY));
    }

    #[test]
    fn new_storages_go_first_busy_ones_wait_and_changed_ones_begin_anew() {
        let (storages, now) = (Storages::default(), Instant::now());
        let mut old = Checked::new(place("old", None), now);
        old.reach = Reach::Reachable;
        storages.note("old".to_owned(), old);
        let mut wanted: HashMap<String, Place> =
            [("old".to_owned(), place("old", None)), ("new".to_owned(), place("new", None))].into();
        assert_eq!(storages.due(&wanted, &[], now).unwrap().0, "new");
        assert_eq!(storages.due(&wanted, &["new".to_owned()], now).unwrap().0, "old");
        let both = ["new".to_owned(), "old".to_owned()];
        assert!(storages.due(&wanted, &both, now).is_none());
        wanted.insert("old".to_owned(), place("elsewhere", None));
        let (_, checked) = storages.due(&wanted, &["new".to_owned()], now).unwrap();
        assert_eq!(checked.reach, Reach::Probing);
        wanted.clear();
        assert!(storages.due(&wanted, &[], now).is_none() && storages.known.lock().is_empty());
    }

    #[test]
    fn an_answer_that_changes_nothing_is_no_news() {
        let (storages, now) = (Storages::default(), Instant::now());
        let mut changes = storages.changes();
        let mut checked = Checked::new(place("b", None), now);
        checked.answered(Reach::Reachable, now);
        storages.note("s".to_owned(), checked.clone());
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        checked.answered(Reach::Reachable, now + PROBE_EVERY);
        storages.note("s".to_owned(), checked);
        assert!(!changes.has_changed().unwrap());
    }

    #[tokio::test]
    async fn a_secret_without_a_key_is_named_and_no_value_is_shown() {
        let credentials = Credentials::new([("accessKeyId".to_owned(), "AKIA".to_owned())].into());
        let reach = ask(&place("bucket", Some("creds")), Some(&credentials), &Metrics::default()).await;
        let Reach::Unreachable { trouble: Trouble::CredentialsMissing, message } = reach else { panic!("{reach:?}") };
        assert!(message.contains("secret `creds`") && message.contains("`secretAccessKey`"), "{message}");
        assert!(message.starts_with("spec.s3.credentialsSecret: ") && !message.contains("AKIA"), "{message}");
    }
}
