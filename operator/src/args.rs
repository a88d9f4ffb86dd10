//! The command line.

use std::net::SocketAddr;

use clap::Parser;

/// The KalamDB operator: compiles the custom resources of one Kubernetes namespace into the catalog of the home store.
#[derive(Parser, Debug)]
#[command(name = "kalamdb-operator", version)]
pub struct Args {
    /// Where the catalog is: `s3://bucket/prefix`, `gs://…`, `az://…` or `file:///folder`, with the store's usual
    /// variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, …); the same as the query pods'.
    #[arg(long, env = "KALAMDB_HOME_URL")]
    pub home_url: String,
    /// Kubernetes namespace of the instance; default: the pod's own.
    #[arg(long, env = "KALAMDB_KUBE_NAMESPACES", value_delimiter = ',')]
    pub kube_namespace: Vec<String>,
    /// Address for /livez, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:2901")]
    pub listen: SocketAddr,
}

/// Why the list of Kubernetes namespaces cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "one home store holds the catalog of one Kubernetes namespace, got `{}`; run one operator for each, each with a \
     home store of its own",
    names.join("`, `")
)]
pub struct SeveralNamespaces {
    names: Vec<String>,
}

impl Args {
    /// The one Kubernetes namespace to watch; `own` if none is named.
    ///
    /// # Errors
    /// If several are named.
    pub fn namespace(&self, own: &str) -> Result<String, SeveralNamespaces> {
        let mut names: Vec<String> = self.kube_namespace.iter().map(|name| name.trim().to_owned()).collect();
        names.retain(|name| !name.is_empty());
        names.dedup();
        match names.as_slice() {
            [] => Ok(own.to_owned()),
            [one] => Ok(one.clone()),
            _ => Err(SeveralNamespaces { names }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(flags: &[&str]) -> Result<String, SeveralNamespaces> {
        let all = ["kalamdb-operator", "--home-url", "memory:"].iter().chain(flags);
        Args::try_parse_from(all).unwrap().namespace("own")
    }

    #[test]
    fn one_namespace_is_taken_and_none_means_the_pods_own() {
        assert_eq!(namespace(&[]).unwrap(), "own");
        assert_eq!(namespace(&["--kube-namespace", ""]).unwrap(), "own");
        assert_eq!(namespace(&["--kube-namespace", "prod"]).unwrap(), "prod");
        assert_eq!(namespace(&["--kube-namespace", "prod,prod"]).unwrap(), "prod");
    }

    #[test]
    fn several_namespaces_are_refused_by_name() {
        for flags in [vec!["--kube-namespace", "a,b"], vec!["--kube-namespace", "a", "--kube-namespace", "b"]] {
            let error = namespace(&flags).unwrap_err().to_string();
            assert!(error.contains("`a`, `b`"), "{error}");
        }
    }
}
