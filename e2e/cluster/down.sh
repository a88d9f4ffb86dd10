#!/usr/bin/env bash
# Stops the cluster and removes every trace of it. Safe at any time, twice too, and after a crash of up.sh.
set -uo pipefail
. "$(dirname "$0")/env.sh"
[ -d "$STATE" ] || exit 0
[ "$(id -u)" = 0 ] || die "a cluster needs root"

# With the first process of its PID namespace the kernel kills every other one, and with the last process go the
# mounts, links, routes and packet rules of the namespaces.
kill_node() {
  for file in node.pid unshare.pid; do
    pid=$(cat "$STATE/$file" 2>/dev/null)
    is_ours "$pid" cluster/node.sh || continue
    kill -KILL "$pid"
    wait_for 20 "the end of process $pid" test ! -d "/proc/$pid"
  done
  ip link del "$HOST_IF" 2>/dev/null
}

remove_cgroups() {
  for group in /sys/fs/cgroup/*/"$CGROUP" "/sys/fs/cgroup/$CGROUP"; do
    [ -d "$group" ] && find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
  done
  ! compgen -G "/sys/fs/cgroup/*/$CGROUP" && [ ! -d "/sys/fs/cgroup/$CGROUP" ]
}

restore_sysctls() {
  [ -s "$STATE/sysctls" ] || return
  while read -r key value; do echo "$value" >"/proc/sys/$key"; done 2>/dev/null <"$STATE/sysctls"
}

remove_made_folders() {
  [ -s "$STATE/made-folders" ] || return
  while read -r folder; do rmdir "$folder"; done 2>/dev/null <"$STATE/made-folders"
}

kill_node
wait_for 10 "the pods' control groups to be empty" remove_cgroups
restore_sysctls
remove_made_folders
grep -qF " $STATE/" /proc/self/mountinfo && die "a mount is left under $STATE"
rm -rf --one-file-system "$STATE"
rmdir "$STATE_HOME" 2>/dev/null || true # unless an S3 server is there
