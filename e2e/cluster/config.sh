#!/usr/bin/env bash
# Writes the configuration files of the node's daemons into STATE.
set -euo pipefail
. "$(dirname "$0")/env.sh"

# Debian puts the CNI plugins in the first place, upstream packages in the second.
cni_bin=/usr/lib/cni
[ -x $cni_bin/bridge ] || cni_bin=/opt/cni/bin

# An overlay cannot lie on an overlay, which is what the file system of a container usually is.
snapshotter() {
  local try=$STATE/overlay-probe
  mkdir -p "$try"/{lower,upper,work,merged}
  if unshare --mount mount -t overlay probe \
    -o "lowerdir=$try/lower,upperdir=$try/upper,workdir=$try/work" "$try/merged" 2>/dev/null; then
    echo overlayfs
  else
    echo native
  fi
  rm -rf "$try"
}

# restrict_oom_score_adj: sandboxes ask for a score that needs CAP_SYS_RESOURCE, which root in a container lacks.
containerd_toml() {
  cat <<Y
version = 2
root = "$STATE/containerd/root"
state = "$STATE/containerd/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "$STATE/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$STATE/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE_IMAGE"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$cni_bin"
    conf_dir = "$STATE/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$(snapshotter)"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
Y
}

cni_conflist() {
  cat <<Y
{"cniVersion": "1.0.0", "name": "kalamdb", "plugins": [
  {"type": "bridge", "bridge": "kalamdb-br", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$STATE/cni/ipam", "ranges": [[{"subnet": "$POD_CIDR"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
Y
}

# Nothing is evicted and no image is collected: a full disk must not look like a failing test, and images have no
# registry to come back from.
kubelet_yaml() {
  cat <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $STATE/pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $STATE/pki/kubelet-server.crt
tlsPrivateKeyFile: $STATE/pki/kubelet-server.key
containerRuntimeEndpoint: unix://$STATE/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP
failCgroupV1: false
failSwapOn: false
clusterDNS: [$NODE_IP]
clusterDomain: cluster.local
resolvConf: $STATE/resolv.conf
podLogsDir: $STATE/log/pods
volumePluginDir: $STATE/kubelet/volumeplugins
evictionHard: {imagefs.available: 0%, imagefs.inodesFree: 0%, nodefs.available: 0%, nodefs.inodesFree: 0%, memory.available: 0%}
imageGCHighThresholdPercent: 100
serializeImagePulls: false
nodeStatusUpdateFrequency: 2s
syncFrequency: 10s
shutdownGracePeriod: 0s
Y
}

proxy_yaml() {
  cat <<Y
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: $PROXY_MODE
clusterCIDR: $POD_CIDR
hostnameOverride: $NODE
clientConnection: {kubeconfig: $STATE/proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
iptables: {minSyncPeriod: 100ms}
nftables: {minSyncPeriod: 100ms}
Y
}

# What pods ask of the API server; the tests hold their roles against it. Kubernetes' own controllers are left out.
audit_yaml() {
  cat <<Y
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: None, userGroups: ["system:serviceaccounts:kube-system"]}
  - {level: Metadata, userGroups: ["system:serviceaccounts"]}
Y
}

corefile() {
  cat <<Y
. {
  bind $NODE_IP
  errors
  ready $NODE_IP:8181
  cache 2
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $STATE/dns.kubeconfig
    ttl 1
  }
}
Y
}

mkdir -p "$STATE"/{log,pids,stopped,etcd,cni,containerd,kubelet/pods}
containerd_toml >"$STATE/containerd.toml"
cni_conflist >"$STATE/cni/10-kalamdb.conflist"
kubelet_yaml >"$STATE/kubelet.yaml"
proxy_yaml >"$STATE/proxy.yaml"
audit_yaml >"$STATE/audit.yaml"
corefile >"$STATE/Corefile"
echo "nameserver $NODE_IP" >"$STATE/resolv.conf"
