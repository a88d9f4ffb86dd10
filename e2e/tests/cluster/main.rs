//! Promises that only a real cluster can keep: API server, kubelet, Service network, volumes, and a real S3 server.
//!
//! Needs the environment that `e2e/cluster/dev.sh env` prints; `make e2e` brings the cluster up and down around it.
//! `kind-config.yaml` says what another cluster has to give. One at a time (`--test-threads=1`): the tests share one
//! instance.
#![allow(missing_docs)]

mod deletion;
mod instance;
mod outage;
mod rights;
mod rules;
mod tables;
