# shellcheck shell=bash disable=SC2034,SC2153
# Settings that the scripts of this folder share. Sourced, never run.
#
# Nothing is written into the checkout: what can be built again is in CACHE, what a running cluster or S3 server
# needs is in STATE_HOME and goes with it. Versions stand in one place each: Kubernetes, etcd and CoreDNS in
# k8s/go.mod, the S3 servers in tools/*/go.mod.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/kalamdb
STATE_HOME=${XDG_STATE_HOME:-$HOME/.local/state}/kalamdb
STATE=$STATE_HOME/cluster # everything the running cluster writes; down.sh removes it
IMAGES=$CACHE/images      # our images as OCI archives
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}

# The node's addresses are fixed, so there is one cluster at a time. The host reaches all of them; pods reach the
# host at HOST_IP and nothing beyond it.
NODE=kalamdb HOST_IF=kalamdb-host NODE_IF=kalamdb-node
HOST_IP=10.111.0.1 NODE_IP=10.111.0.2 LINK_PREFIX=30
POD_CIDR=10.112.0.0/24 SVC_CIDR=10.113.0.0/24 API_SVC_IP=10.113.0.1
PROXY_MODE=${PROXY_MODE:-nftables} # or iptables
CGROUP=kalamdb-e2e                 # all pods' control groups lie under this one
# Paths that are compiled into Kubernetes, containerd and CNI; the node has file systems of its own there.
HARD_CODED="/run/netns /run/containerd /var/lib/cni /var/lib/kubelet /var/log/containers"
PAUSE_IMAGE=kalamdb/pause:1
export KUBECACHEDIR=$STATE/kubecache # kubectl's discovery cache must not outlive the cluster

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

kubectl() { "$STATE/bin/kubectl" --kubeconfig "$STATE/admin.kubeconfig" "$@"; }

ctr() { command ctr --address "$STATE/containerd.sock" --namespace k8s.io "$@"; }

# Whether process $1 is alive and has $2 in its command line: process ids are used again.
is_ours() { [ -n "$1" ] && { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null | grep -qF -- "$2"; }

cluster_runs() { is_ours "$(cat "$STATE/node.pid" 2>/dev/null)" cluster/node.sh; }

wait_for() { # SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "timed out waiting for: $what"
    sleep 0.1
  done
}
