#!/usr/bin/env bash
# Starts a single-node Kubernetes in network, PID, mount, UTS and IPC namespaces of its own, and waits until it
# works. A cluster that runs already is replaced.
#
#   up.sh [IMAGE.tar]...      images to load besides the pause image
#
# Afterwards KUBECONFIG is $STATE/admin.kubeconfig, kubectl is $STATE/bin/kubectl.
# After a crash half way: down.sh, or this script again, removes what was made.
set -euo pipefail
. "$(dirname "$0")/env.sh"
trap 'echo "up.sh: line $LINENO: \`$BASH_COMMAND\` failed; the logs are in $STATE/log" >&2' ERR
[ "$(id -u)" = 0 ] || die "a cluster needs root"
# A Unix socket's path holds 107 bytes, and containerd's lies below STATE.
[ ${#STATE} -lt 85 ] || die "\`$STATE\` is too long for sockets; set XDG_STATE_HOME to a shorter path"

say() { echo "cluster: $1 after $SECONDS s" >&2; }
reached() { # SECONDS WHAT COMMAND...
  (wait_for "$@") || {
    tail -n 3 "$STATE"/log/*.log >&2
    die "the logs are in $STATE/log"
  }
  say "$2"
}

# kubelet changes these for the whole machine; down.sh puts them back.
save_sysctls() {
  for key in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops \
    kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    echo "$key $(cat /proc/sys/$key)"
  done >"$STATE/sysctls"
}

# Mount points that this machine lacks, and the folder that `mount` makes for itself, are listed for down.sh.
make_folders() {
  for folder in $HARD_CODED /run/mount; do
    [ ! -d "$folder" ] || continue
    mkdir -p "$folder"
    echo "$folder" >>"$STATE/made-folders"
  done
}

# Pods live under a group of their own, so that another kubelet's pods on this machine are never touched.
make_cgroups() {
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mkdir -p "/sys/fs/cgroup/$CGROUP"
    return
  fi
  for controller in /sys/fs/cgroup/*/; do mkdir -p "$controller$CGROUP" 2>/dev/null || true; done
}

start_node() {
  setsid unshare --mount --pid --net --uts --ipc --fork --mount-proc --kill-child \
    "$HERE/node.sh" </dev/null >"$STATE/log/node.log" 2>&1 &
  local unshare=$! children=/proc/$!/task/$!/children
  echo $unshare >"$STATE/unshare.pid"
  wait_for 10 "the node's first process" test -e "$STATE/node.waiting"
  node=$(tr -d ' ' <"$children")
  [ -n "$node" ] || die "the node's first process ended; see $STATE/log/node.log"
  echo "$node" >"$STATE/node.pid"
}

# The only link between the node and this machine; it goes when the node goes.
link_node() {
  ip link add "$HOST_IF" type veth peer name "$NODE_IF" netns "$node"
  ip addr add "$HOST_IP/$LINK_PREFIX" dev "$HOST_IF"
  ip link set "$HOST_IF" up
  for range in "$POD_CIDR" "$SVC_CIDR"; do
    ip route add "$range" via "$NODE_IP" || die "another network of this machine uses $range; see env.sh"
  done
  touch "$STATE/node.linked"
}

load_images() {
  "$HERE/image.sh" -t "$PAUSE_IMAGE" -o "$STATE/pause.tar" -f "$pause:/pause" -n /pause -u 65535:65535 2>/dev/null
  "$HERE/load-image.sh" "$STATE/pause.tar" "$@"
}

api_ready() {
  curl -sf --cacert "$STATE/pki/ca.crt" --cert "$STATE/pki/admin.crt" --key "$STATE/pki/admin.key" \
    "https://$NODE_IP:6443/readyz"
}

# A default storage class, served by a fixed set of folders. `local` and not `hostPath`: it honours fsGroup.
volumes() {
  cat <<Y
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: static, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
Y
  for i in $(seq -w 0 19); do
    mkdir -p "$STATE/pvs/pv$i"
    cat <<Y
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: pv$i}
spec:
  storageClassName: static
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: $STATE/pvs/pv$i}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [$NODE]}]}]
Y
  done
}

kube=$("$HERE/build.sh" kube)
pause=$("$HERE/build.sh" pause)
"$HERE/down.sh"
SECONDS=0
mkdir -p "$STATE/bin"
chmod 711 "$STATE"
for name in kube kubectl coredns; do ln -s "$kube" "$STATE/bin/$name"; done
save_sysctls
make_folders
"$HERE/config.sh"
"$HERE/pki.sh"
make_cgroups
start_node
link_node
reached 30 "containerd answers" ctr version
load_images "$@"
reached 120 "the API server is ready" api_ready
volumes | kubectl apply -f - >/dev/null
reached 120 "the node is Ready" kubectl wait --for=condition=Ready "node/$NODE" --timeout=1s
reached 60 "the default service account exists" kubectl -n default get serviceaccount default
reached 60 "cluster DNS answers" curl -sf "http://$NODE_IP:8181/ready"
