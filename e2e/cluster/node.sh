#!/usr/bin/env bash
# The first process of the node's namespaces, started by up.sh: starts every daemon of the cluster, starts one that
# ends again, and reaps orphans. Everything in here dies with this process.
set -u
. "$(dirname "$0")/env.sh"
trap 'exit 0' TERM INT

mount --make-rshared / # volumes need propagation; it reaches this mount namespace only
hostname "$NODE"
ip link set lo up
: >"$STATE/node.waiting"
wait_for 30 "the link to the host" test -e "$STATE/node.linked"
ip addr add "$NODE_IP/$LINK_PREFIX" dev "$NODE_IF"
ip link set "$NODE_IF" up
# The host can be reached and nothing beyond it: there is no default route. Service addresses need some route all
# the same, for the kernel looks one up before it rewrites them.
ip route add "$SVC_CIDR" dev lo src "$NODE_IP"
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
echo 1 2>/dev/null >/proc/sys/net/bridge/bridge-nf-call-iptables # absent until a bridge filter is loaded

# Kept off the machine's own /run and /var; the mount points were made by up.sh.
for folder in $HARD_CODED; do mount -t tmpfs -o mode=755 kalamdb "$folder"; done
mount --bind "$STATE/resolv.conf" /etc/resolv.conf # names come from the cluster only

run() { # NAME COMMAND...: keeps it running, its output in log/NAME.log, unless daemon.sh stopped it
  local name=$1
  shift
  while :; do
    while [ -e "$STATE/stopped/$name" ]; do sleep 0.1; done
    "$@" &
    echo $! >"$STATE/pids/$name"
    wait $!
    echo "$(date -Is) node.sh: $name ended with $?"
    sleep 0.5
  done >>"$STATE/log/$name.log" 2>&1 &
}
kube() { run "$1" "$STATE/bin/kube" "$@"; }

P=$STATE/pki
run containerd containerd --config "$STATE/containerd.toml"
# No fsync: nothing of a cluster outlives its machine.
kube etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level=warn \
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380
kube kube-apiserver --etcd-servers http://127.0.0.1:2379 --bind-address 0.0.0.0 --advertise-address "$NODE_IP" \
  --secure-port 6443 --service-cluster-ip-range "$SVC_CIDR" --authorization-mode Node,RBAC \
  --kubelet-preferred-address-types InternalIP --enable-admission-plugins NodeRestriction --anonymous-auth=false \
  --allow-privileged --client-ca-file "$P/ca.crt" \
  --tls-cert-file "$P/apiserver.crt" --tls-private-key-file "$P/apiserver.key" \
  --kubelet-client-certificate "$P/apiserver-kubelet.crt" --kubelet-client-key "$P/apiserver-kubelet.key" \
  --kubelet-certificate-authority "$P/ca.crt" \
  --service-account-issuer https://kubernetes.default.svc.cluster.local \
  --audit-policy-file "$STATE/audit.yaml" --audit-log-path "$STATE/log/audit.log" \
  --service-account-key-file "$P/sa.pub" --service-account-signing-key-file "$P/sa.key" \
  --requestheader-client-ca-file "$P/front-ca.crt" --requestheader-allowed-names front-proxy-client \
  --requestheader-username-headers X-Remote-User --requestheader-group-headers X-Remote-Group \
  --requestheader-extra-headers-prefix X-Remote-Extra- \
  --proxy-client-cert-file "$P/front.crt" --proxy-client-key-file "$P/front.key"
until curl -sf --cacert "$P/ca.crt" --cert "$P/admin.crt" --key "$P/admin.key" "https://$NODE_IP:6443/readyz" >/dev/null; do
  sleep 0.1
done
# The client's usual throttle makes the first service accounts take five seconds.
fast="--kube-api-qps 500 --kube-api-burst 1000"
# shellcheck disable=SC2086  # the words of the flags
kube kube-controller-manager --kubeconfig "$STATE/controller-manager.kubeconfig" \
  --authentication-kubeconfig "$STATE/controller-manager.kubeconfig" \
  --authorization-kubeconfig "$STATE/controller-manager.kubeconfig" \
  --bind-address 127.0.0.1 --leader-elect=false --use-service-account-credentials $fast \
  --root-ca-file "$P/ca.crt" --service-account-private-key-file "$P/sa.key" \
  --cluster-signing-cert-file "$P/ca.crt" --cluster-signing-key-file "$P/ca.key" \
  --allocate-node-cidrs=false --flex-volume-plugin-dir "$STATE/kubelet/volumeplugins" \
  --node-monitor-period 2s --node-monitor-grace-period 20s
# shellcheck disable=SC2086
kube kube-scheduler --kubeconfig "$STATE/scheduler.kubeconfig" \
  --authentication-kubeconfig "$STATE/scheduler.kubeconfig" \
  --authorization-kubeconfig "$STATE/scheduler.kubeconfig" --bind-address 127.0.0.1 --leader-elect=false $fast
kube kubelet --config "$STATE/kubelet.yaml" --kubeconfig "$STATE/kubelet.kubeconfig" --hostname-override "$NODE" \
  --node-ip "$NODE_IP" --root-dir "$STATE/kubelet"
kube kube-proxy --config "$STATE/proxy.yaml"
run coredns "$STATE/bin/coredns" -conf "$STATE/Corefile"

# A volume whose claim is gone is emptied and offered again, so that tests cannot use them all up.
recycle() {
  kubectl get pv -w -o 'jsonpath={.metadata.name} {.status.phase}{"\n"}' | while read -r name phase; do
    [ "$phase" = Released ] || continue
    find "${STATE:?}/pvs/$name" -mindepth 1 -delete
    kubectl patch pv "$name" --type=merge -p '{"spec":{"claimRef":null}}'
  done
}
run recycler recycle
while :; do wait -n 2>/dev/null || sleep 1; done
