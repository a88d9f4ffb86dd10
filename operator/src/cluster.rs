//! Every call to the API server but the watches: each with a time limit, none with a retry of its own.
//!
//! Owns: how statuses and events are written, how Secrets are read. Does not own: what is written.
//!
//! Writes carry the resource version of the object that they were decided on: what somebody else has changed meanwhile
//! is decided on again, never overwritten.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Secret};
use kalamdb_crds::{API_VERSION, Namespace, ReplicaNode, SharedTable, Storage, UserTable};
use kalamdb_model::declared::{Kind, ObjectRef};
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::status::{News, bounded};
use crate::watch::Seen;

/// Who we are to the API server.
pub const MANAGER: &str = "kalamdb-operator";
/// One call, the client's own retries included.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest note of an event, bytes, as the API wants it.
const NOTE_BYTES_MAX: usize = 1024;

/// One Kubernetes namespace, as the operator uses it.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    namespace: String,
    recorder: Recorder,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The API server refuses, or cannot be reached.
    #[error("the Kubernetes API refused or failed to {action}")]
    Api {
        /// What was to be done.
        action: &'static str,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// No answer in time.
    #[error("the Kubernetes API did not {action} in {} s", CALL_TIMEOUT.as_secs())]
    Timeout {
        /// What was to be done.
        action: &'static str,
    },
}

impl CallError {
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Self::Timeout { .. } => None,
        }
    }

    /// The object has changed since it was seen, or is gone: the next pass sees it anew.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.status().is_some_and(|status| status.is_conflict() || status.is_not_found())
    }

    /// The operator's role does not allow it.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        self.status().is_some_and(kube::core::Status::is_forbidden)
    }
}

/// An error with all its causes, for logs.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl Cluster {
    /// `instance` is named in events.
    #[must_use]
    pub fn new(client: Client, namespace: String, instance: String) -> Self {
        let reporter = Reporter { controller: format!("{}/operator", kalamdb_crds::GROUP), instance: Some(instance) };
        Self { recorder: Recorder::new(client.clone(), reporter), client, namespace }
    }

    /// The Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Objects of `kind`, undecoded.
    #[must_use]
    pub fn api(&self, kind: Kind) -> Api<DynamicObject> {
        let resource = match kind {
            Kind::Storage => ApiResource::erase::<Storage>(&()),
            Kind::Namespace => ApiResource::erase::<Namespace>(&()),
            Kind::ReplicaNode => ApiResource::erase::<ReplicaNode>(&()),
            Kind::UserTable => ApiResource::erase::<UserTable>(&()),
            Kind::SharedTable => ApiResource::erase::<SharedTable>(&()),
        };
        Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
    }

    /// Merges `patch` into the object's status; returns the object as it is then.
    ///
    /// # Errors
    /// Also if the object is no longer the one that was seen.
    pub async fn patch_status(&self, object: &ObjectRef, patch: &Value) -> Result<Seen, CallError> {
        let unchanged = json!({"resourceVersion": object.resource_version, "uid": object.uid});
        let patch = Patch::Merge(json!({"metadata": unchanged, "status": patch}));
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.api(object.kind);
        let written = within("write a status", api.patch_status(&object.name, &params, &patch)).await?;
        Ok(Seen::decode(object.kind, written))
    }

    /// The values of a Secret that are text; `None` if there is no such Secret.
    ///
    /// # Errors
    /// If the API server does not say.
    pub async fn secret(&self, name: &str) -> Result<Option<BTreeMap<String, String>>, CallError> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = within("read a secret", api.get_opt(name)).await?;
        Ok(secret.map(|secret| {
            let data = secret.data.unwrap_or_default();
            data.into_iter().filter_map(|(key, value)| Some((key, String::from_utf8(value.0).ok()?))).collect()
        }))
    }

    /// Publishes an event about an object.
    ///
    /// # Errors
    /// If it cannot be published; nothing depends on it.
    pub async fn publish(&self, object: &ObjectRef, news: &News) -> Result<(), CallError> {
        let event = Event {
            type_: if news.good { EventType::Normal } else { EventType::Warning },
            reason: news.reason.clone(),
            note: Some(bounded(&news.message, NOTE_BYTES_MAX)).filter(|note| !note.is_empty()),
            action: "Compile".to_owned(),
            secondary: None,
        };
        let regarding = ObjectReference {
            api_version: Some(API_VERSION.to_owned()),
            kind: Some(object.kind.as_str().to_owned()),
            name: Some(object.name.clone()),
            namespace: Some(self.namespace.clone()),
            uid: Some(object.uid.clone()),
            ..ObjectReference::default()
        };
        within("publish an event", self.recorder.publish(&event, &regarding)).await
    }
}

async fn within<T>(action: &'static str, call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(source)) => Err(CallError::Api { action, source: Box::new(source) }),
        Err(_) => Err(CallError::Timeout { action }),
    }
}
