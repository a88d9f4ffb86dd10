#!/usr/bin/env bash
# Makes the keys, certificates and kubeconfigs of one cluster in STATE. EC keys: all of it takes under a second.
set -euo pipefail
. "$(dirname "$0")/env.sh"
umask 077
mkdir -p "$STATE/pki"
cd "$STATE/pki"

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }
authority() { # NAME
  key "$1"
  openssl req -x509 -new -key "$1.key" -subj "/CN=kalamdb-$1" -days 3650 -out "$1.crt" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature
}
certificate() { # AUTHORITY NAME SUBJECT USAGE [NAMES]
  key "$2"
  openssl req -new -key "$2.key" -subj "$3" -out "$2.csr"
  {
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=$4"
    [ -z "${5-}" ] || echo "subjectAltName=$5"
  } >"$2.ext"
  openssl x509 -req -in "$2.csr" -CA "$1.crt" -CAkey "$1.key" -CAcreateserial -days 3650 -out "$2.crt" \
    -extfile "$2.ext" 2>/dev/null
}
kubeconfig() { # NAME SUBJECT: a client certificate, and the kubeconfig that carries it
  certificate ca "$1" "$2" clientAuth
  cat >"$STATE/$1.kubeconfig" <<Y
apiVersion: v1
kind: Config
clusters: [{name: kalamdb, cluster: {server: "https://$NODE_IP:6443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "$1.crt"), client-key-data: $(base64 -w0 "$1.key")}}]
contexts: [{name: kalamdb, context: {cluster: kalamdb, user: $1}}]
current-context: kalamdb
Y
}

authority ca
authority front-ca # vouches for requests that the API server passes on to aggregated servers
key sa
openssl ec -in sa.key -pubout -out sa.pub 2>/dev/null
service=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
certificate ca apiserver /CN=kube-apiserver serverAuth "$service,DNS:localhost,IP:127.0.0.1,IP:$NODE_IP,IP:$API_SVC_IP"
certificate ca apiserver-kubelet /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
certificate ca kubelet-server "/CN=system:node:$NODE" serverAuth "DNS:$NODE,IP:$NODE_IP"
certificate front-ca front /CN=front-proxy-client clientAuth
kubeconfig admin /O=system:masters/CN=kalamdb-admin
kubeconfig kubelet "/O=system:nodes/CN=system:node:$NODE"
kubeconfig controller-manager /CN=system:kube-controller-manager
kubeconfig scheduler /CN=system:kube-scheduler
kubeconfig proxy /CN=system:kube-proxy
kubeconfig dns /O=system:masters/CN=kalamdb-dns
