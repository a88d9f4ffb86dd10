#!/usr/bin/env bash
# Packs the programs of the last `cargo build --workspace --bins` as images, and prints the archives' paths.
set -euo pipefail
. "$(dirname "$0")/env.sh"
bundle=/etc/ssl/certs/ca-certificates.crt # for S3 over TLS

image() { # PROGRAM NAME:TAG
  local built=$CARGO_TARGET_DIR/debug/$1 out=$IMAGES/$1.tar files=()
  [ -x "$built" ] || die "\`$built\` is missing; run: cargo build --workspace --bins"
  [ ! -s $bundle ] || files=(-f "$bundle:$bundle")
  # A debug binary is mostly symbols, which nobody reads inside the cluster.
  strip -o "$tmp/$1" "$built"
  "$HERE/image.sh" -t "$2" -o "$out" -l "$tmp/$1:/usr/local/bin/$1" "${files[@]}" -n "/usr/local/bin/$1" -u 65532:65532
  echo "$out"
}

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
image kalamdb-query-pod kalamdb/query-pod:dev
image kalamdb-operator kalamdb/operator:dev
