#!/usr/bin/env bash
# Stops one daemon of the running cluster, or lets it run again, for tests of what happens then.
#
#   daemon.sh stop|start NAME      NAME: a file in $STATE/pids, such as kube-apiserver, kubelet or coredns
set -euo pipefail
. "$(dirname "$0")/env.sh"
cluster_runs || die "no cluster is running"
[ -e "$STATE/pids/${2-}" ] || die "no daemon \`${2-}\`; there are: $(cd "$STATE/pids" && echo *)"
case $1 in
  stop)
    touch "$STATE/stopped/$2" # first: node.sh looks for it when the process has ended
    nsenter --target "$(cat "$STATE/node.pid")" --pid kill -KILL "$(cat "$STATE/pids/$2")"
    ;;
  start) rm -f "$STATE/stopped/$2" ;;
  *) die "usage: daemon.sh stop|start NAME" ;;
esac
