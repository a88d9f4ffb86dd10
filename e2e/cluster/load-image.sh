#!/usr/bin/env bash
# The image loader of this cluster: imports OCI archives into the node's containerd.
#
#   load-image.sh ARCHIVE.tar...
set -euo pipefail
. "$(dirname "$0")/env.sh"
cluster_runs || die "no cluster is running; start one with: make dev-cluster"
for archive in "$@"; do ctr images import "$archive" >/dev/null; done
