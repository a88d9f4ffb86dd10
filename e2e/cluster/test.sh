#!/usr/bin/env bash
# Runs a command against a fresh instance on a fresh cluster, and removes both afterwards: `make e2e`.
#
#   test.sh COMMAND...
#
# The command finds what `dev.sh env` prints in its environment. When it fails, pods, events and logs are printed.
set -euo pipefail
. "$(dirname "$0")/env.sh"
owner=$STATE_HOME/cluster-test.pid # says that the running cluster is a test's, and whose

if cluster_runs; then
  [ -s "$owner" ] || die "a development cluster is running; remove it first: make dev-cluster-down"
  ! is_ours "$(cat "$owner")" test.sh || die "another test run, process $(cat "$owner"), is using the cluster"
fi
finish() {
  local status=$?
  [ $status = 0 ] || ! cluster_runs || "$HERE/dev.sh" report
  rm -f "$owner"
  "$HERE/dev.sh" down
  exit $status
}
"$HERE/dev.sh" down # what a killed run left
mkdir -p "$STATE_HOME"
echo $$ >"$owner"
trap finish EXIT
"$HERE/dev.sh" up >/dev/null
eval "$("$HERE/dev.sh" env)"
"$@"
