#!/usr/bin/env bash
# Builds a container image as an OCI-layout tar, with no engine and no registry.
#
#   image.sh -t NAME:TAG -o OUT.tar [-f SRC:DST]... [-l SRC:DST]... [-n ENTRYPOINT_ARG]... [-u UID:GID]
#
#   -f  copies one file (or folder) into the image
#   -l  the same, and also every shared library that it needs (ldd), at the same paths
#
# The same inputs give the same bytes: times, owners and order are fixed.
set -euo pipefail
. "$(dirname "$0")/env.sh"

name='' out='' user='' files=() programs=() entrypoint=()
while getopts t:o:f:l:n:u: option; do
  case $option in
    t) name=$OPTARG ;;
    o) out=$OPTARG ;;
    f) files+=("$OPTARG") ;;
    l) programs+=("$OPTARG") ;;
    n) entrypoint+=("$OPTARG") ;;
    u) user=$OPTARG ;;
    *) die "unknown option; the first lines of $0 say what there is" ;;
  esac
done
[[ -n $name && -n $out ]] || die "-t and -o are needed"
case $(uname -m) in
  x86_64) arch=amd64 ;;
  aarch64) arch=arm64 ;;
  *) die "no image architecture is known for \`$(uname -m)\`" ;;
esac
umask 022 # the modes of folders are part of the bytes
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
fs=$tmp/rootfs oci=$tmp/oci
mkdir -p "$fs/etc" "$oci/blobs/sha256"

put() { # SRC DST, following links, keeping the mode
  install -d "$fs$(dirname "$2")"
  cp -rL --preserve=mode "$1" "$fs$2"
}
# A static program has none, and ldd calls that a failure.
libraries() {
  { ldd "$1" 2>/dev/null || true; } |
    awk '/not found/ {print "image.sh: a library is missing: " $1 >"/dev/stderr"; exit 1}
      /=> \// {print $3}
      /^[ \t]*\// {print $1}'
}
archive() { # FOLDER OUT ENTRY...
  tar --format=gnu --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$1" -cf "$2" "${@:3}"
}
blob() { # FILE: moves it into the layout, prints its digest and size
  local digest size
  digest=$(sha256sum "$1" | cut -d' ' -f1)
  size=$(stat -c %s "$1")
  mv "$1" "$oci/blobs/sha256/$digest"
  echo "sha256:$digest $size"
}

for file in "${files[@]}"; do put "${file%%:*}" "${file#*:}"; done
for program in "${programs[@]}"; do
  put "${program%%:*}" "${program#*:}"
  libraries "${program%%:*}" | while read -r library; do
    [ -e "$fs$library" ] || put "$library" "$library"
  done
done
install -d -m 1777 "$fs/tmp"
printf 'root:x:0:0:root:/:/\nkalamdb:x:65532:65532:kalamdb:/:/\n' >"$fs/etc/passwd"
printf 'root:x:0:\nkalamdb:x:65532:\n' >"$fs/etc/group"
echo 'hosts: files dns' >"$fs/etc/nsswitch.conf"

archive "$fs" "$tmp/layer.tar" .
read -r layer layer_size < <(blob "$tmp/layer.tar")
jq -cn --arg arch "$arch" --arg layer "$layer" --arg user "$user" '{
    created: "1970-01-01T00:00:00Z", architecture: $arch, os: "linux",
    config: ({Env: ["PATH=/usr/local/bin:/usr/bin:/bin"], WorkingDir: "/", Entrypoint: $ARGS.positional}
      + (if $user != "" then {User: $user} else {} end)),
    rootfs: {type: "layers", diff_ids: [$layer]},
    history: [{created: "1970-01-01T00:00:00Z", created_by: "image.sh"}]
  }' --args "${entrypoint[@]}" >"$tmp/config.json"
read -r config config_size < <(blob "$tmp/config.json")
jq -cn --arg config "$config" --argjson config_size "$config_size" --arg layer "$layer" --argjson layer_size "$layer_size" '{
    schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
    config: {mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size},
    layers: [{mediaType: "application/vnd.oci.image.layer.v1.tar", digest: $layer, size: $layer_size}]
  }' >"$tmp/manifest.json"
read -r manifest manifest_size < <(blob "$tmp/manifest.json")
# containerd stores short names in full, and kubelet asks for them so.
jq -cn --arg arch "$arch" --arg manifest "$manifest" --argjson manifest_size "$manifest_size" --arg name "$name" '{
    schemaVersion: 2, manifests: [{
      mediaType: "application/vnd.oci.image.manifest.v1+json", digest: $manifest, size: $manifest_size,
      platform: {architecture: $arch, os: "linux"},
      annotations: {
        "io.containerd.image.name": ("docker.io/" + $name),
        "org.opencontainers.image.ref.name": ($name | split(":") | last)
      }
    }]
  }' >"$oci/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$oci/oci-layout"
mkdir -p "$(dirname "$out")"
archive "$oci" "$out.$$" oci-layout index.json blobs
mv "$out.$$" "$out"
echo "$name ${manifest:0:19} $((layer_size / 1000000)) MB -> $out" >&2
