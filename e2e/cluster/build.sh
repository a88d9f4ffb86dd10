#!/usr/bin/env bash
# Builds one Go tool of the cluster, unless it is in the cache already, and prints the path of its binary.
#
#   build.sh kube|pause|versitygw|minio
#
# The cache key is the module's source and locked versions, and Go's version; an old key's folder may be deleted.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -trimpath" GOWORK=off
RECIPE=1 # raise it when a flag below changes
command -v go >/dev/null || die "\`go\` is not installed; see CONTRIBUTING.md"

# Without these, kubelet and kubectl report a version that other parts refuse to work with.
kube_version_flags() {
  local version minor package
  version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
  minor=${version#v1.}
  minor=${minor%%.*}
  for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    printf -- '-X %s ' "$package.gitVersion=$version" "$package.gitMajor=1" "$package.gitMinor=$minor" \
      "$package.gitCommit=" "$package.gitTreeState=archive" "$package.buildDate=1970-01-01T00:00:00Z"
  done
}

tool=${1-}
case $tool in
  kube) module=k8s package=. ;;
  pause) module=images package=./pause ;;
  versitygw) module=tools/vgw package=github.com/versity/versitygw/cmd/versitygw ;;
  minio) module=tools/minio package=github.com/minio/minio ;;
  *) die "no tool \`$tool\`; there are kube, pause, versitygw and minio" ;;
esac
cd "$HERE/$module"
key=$({
  find . -type f | LC_ALL=C sort | xargs sha256sum
  go env GOVERSION GOARCH
  echo "$RECIPE"
} | sha256sum | cut -c1-16)
out=$CACHE/tools/$tool-$key
if [ ! -x "$out/$tool" ]; then
  echo "building $tool (once; later runs take it from $CACHE/tools)" >&2
  ldflags="-s -w"
  [ "$tool" != kube ] || ldflags="$ldflags $(kube_version_flags)"
  mkdir -p "$out"
  # Under another name first: a build that is interrupted leaves nothing that looks finished.
  go build -ldflags "$ldflags" -o "$out/$tool.$$" "$package" >&2
  mv "$out/$tool.$$" "$out/$tool"
  echo "built $tool in $SECONDS s" >&2
fi
echo "$out/$tool"
