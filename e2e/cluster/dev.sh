#!/usr/bin/env bash
# One KalamDB instance on a real cluster of this machine: operator, query pod, Service, and an S3 server beside it.
#
#   dev.sh up       builds and starts all of it; on a running one: loads the new images and manifests, keeps the data
#   dev.sh env      prints the lines to `eval` before kubectl, or before the tests of e2e/tests/cluster
#   dev.sh install  installs the instance on another cluster, that of KUBECONFIG; kind-config.yaml shows how
#   dev.sh report   prints pods, events and logs, for a failure
#   dev.sh down     removes everything
set -euo pipefail
. "$(dirname "$0")/env.sh"
S3=cluster # the S3 server's name

# The Storage credentials and the home store's are the same here: one server, two buckets.
secrets() {
  local jwt
  # An instance that runs already keeps its secret, or every token handed out so far would end.
  jwt=$(kubectl -n kalamdb get secret kalamdb-jwt -o 'jsonpath={.data.secret}' 2>/dev/null) ||
    jwt=$(openssl rand -hex 32 | tr -d '\n' | base64 -w0)
  cat <<Y
apiVersion: v1
kind: Secret
metadata: {name: kalamdb-jwt, namespace: kalamdb}
data: {secret: $jwt}
---
apiVersion: v1
kind: Secret
metadata: {name: kalamdb-home, namespace: kalamdb}
stringData:
  AWS_ACCESS_KEY_ID: $KALAMDB_TEST_S3_ACCESS_KEY
  AWS_SECRET_ACCESS_KEY: $KALAMDB_TEST_S3_SECRET_KEY
  AWS_ENDPOINT: http://s3:9000
  AWS_REGION: $KALAMDB_TEST_S3_REGION
  AWS_ALLOW_HTTP: "true"
---
apiVersion: v1
kind: Secret
metadata: {name: s3-credentials, namespace: kalamdb}
stringData:
  accessKeyId: $KALAMDB_TEST_S3_ACCESS_KEY
  secretAccessKey: $KALAMDB_TEST_S3_SECRET_KEY
Y
}

# Inside the cluster the server has a name, so that examples need not know this machine's address and port.
s3_service() {
  local address=${KALAMDB_TEST_S3_ENDPOINT#http://}
  address=${address%:*}
  cat <<Y
apiVersion: v1
kind: Service
metadata: {name: s3, namespace: kalamdb}
spec: {ports: [{name: s3, port: 9000}]} # examples/s3 names it
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s3, namespace: kalamdb, labels: {kubernetes.io/service-name: s3}}
addressType: IPv4
ports: [{name: s3, port: ${KALAMDB_TEST_S3_ENDPOINT##*:}}]
endpoints: [{addresses: [$address]}]
Y
}

apply() {
  [ -d "$ROOT/crds/manifests" ] || die "\`crds/manifests\` is missing; run: cargo run --bin kalamdb-crds generate"
  kubectl apply --server-side -f "$ROOT/crds/manifests" >&2
  kubectl wait --for=condition=Established crd --all --timeout=60s >/dev/null
  rm -rf "$KUBECACHEDIR" # kubectl remembers for hours which kinds there were
  kubectl apply -f "$ROOT/e2e/manifests/namespace.yaml" >&2
  secrets | kubectl apply -f - >/dev/null
  s3_service | kubectl apply -f - >/dev/null
  kubectl apply -f "$ROOT/e2e/manifests" >&2
}

ready() {
  kubectl -n kalamdb rollout status deployment/kalamdb-operator --timeout=120s >&2 &&
    kubectl -n kalamdb rollout status statefulset/kalamdb --timeout=120s >&2
}

up() {
  local archives again=
  [ "$(id -u)" = 0 ] || die "a cluster needs root; run: sudo -E env \"PATH=\$PATH\" make dev-cluster"
  "$HERE/install.sh" build
  "$HERE/install.sh" cluster
  (cd "$ROOT" && cargo build --workspace --bins)
  mapfile -t archives < <("$HERE/images.sh")
  [ ${#archives[@]} = 2 ] || die "the images could not be built"
  if cluster_runs; then
    again=yes
    "$HERE/load-image.sh" "${archives[@]}"
  else
    "$HERE/up.sh" "${archives[@]}"
  fi
  "$HERE/s3.sh" start $S3 "$HOST_IP" kalamdb-data kalamdb-home
  eval "$("$HERE/s3.sh" env $S3)"
  apply
  # The tags stay the same, so the pods do not notice new images by themselves.
  [ -z "$again" ] || kubectl -n kalamdb rollout restart deployment/kalamdb-operator statefulset/kalamdb >&2
  ready || {
    report
    die "operator or query pod did not become ready"
  }
}

install() {
  [ -n "${KUBECONFIG-}" ] || die "\`KUBECONFIG\` is not set"
  [ -n "${KALAMDB_TEST_S3_ENDPOINT-}" ] || die "no S3 server; start one with s3.sh and \`eval\` its variables"
  export KUBECACHEDIR
  KUBECACHEDIR=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder as of now
  trap "rm -rf $KUBECACHEDIR" EXIT
  kubectl() { command kubectl "$@"; }
  apply
  ready || die "operator or query pod did not become ready"
}

variables() {
  cluster_runs || die "no cluster is running; start one with: make dev-cluster"
  "$HERE/s3.sh" env $S3
  cat <<Y
export KUBECONFIG=$STATE/admin.kubeconfig
export KUBECACHEDIR=$KUBECACHEDIR
export KALAMDB_AUDIT_LOG=$STATE/log/audit.log
export PATH=$STATE/bin:\$PATH
Y
}

next_steps() {
  local ip
  ip=$(kubectl -n kalamdb get service kalamdb -o 'jsonpath={.spec.clusterIP}')
  cat <<Y

KalamDB is running. To go on, paste:

  eval "\$(e2e/cluster/dev.sh env)"              # KUBECONFIG, and kubectl into PATH
  kubectl -n kalamdb apply -f examples/s3/
  kubectl -n kalamdb get kalamdb                 # every custom resource
  TOKEN=\$(kubectl -n kalamdb exec kalamdb-0 -- kalamdb-query-pod token --user alice)
  curl -sS http://$ip:2900/v1/api/sql -H "Authorization: Bearer \$TOKEN" -H 'Content-Type: application/json' \\
    -d '{"sql": "SELECT 1"}'

The S3 server is at $KALAMDB_TEST_S3_ENDPOINT, its files are in $STATE_HOME/s3/$S3/data.
make dev-cluster-down removes everything.
Y
}

report() {
  {
    echo "--- pods"
    kubectl get pods -A -o wide
    echo "--- events"
    kubectl get events -A --sort-by=.lastTimestamp | tail -n 40
    for pod in $(kubectl -n kalamdb get pods -o name); do
      echo "--- $pod"
      kubectl -n kalamdb get "$pod" -o 'jsonpath={.status.conditions}{"\n"}{.status.containerStatuses}{"\n"}'
      kubectl -n kalamdb logs "$pod" --tail=60
      kubectl -n kalamdb logs "$pod" --tail=60 --previous 2>/dev/null
    done
  } >&2 || true
}

down() {
  "$HERE/s3.sh" remove $S3
  "$HERE/down.sh"
  rmdir "$STATE_HOME" 2>/dev/null || true
}

case ${1-} in
  up)
    up
    next_steps
    ;;
  env) variables ;;
  install) install ;;
  report) report ;;
  down) down ;;
  *) die "usage: dev.sh up|env|install|report|down" ;;
esac
