#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages whose commands are missing; does nothing when all are there.
#
#   install.sh build      what compiling and `make run` need
#   install.sh test       what the tests that need no cluster need besides
#   install.sh cluster    what the cluster and the S3 servers need besides
#
# Not root: prints the line to run, and fails. Rust and Go come from their own installers, not from here.
set -euo pipefail
. "$(dirname "$0")/env.sh"

missing=()
need() { # PACKAGE TEST...: the package is missing when the test fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1"; }
# bindgen, which RocksDB's crate runs, loads libclang and reads the headers that belong to it.
has_libclang() {
  compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h'
}
has_cni() { [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ]; }
has_ca() { [ -s /etc/ssl/certs/ca-certificates.crt ]; }

build_packages() {
  need make has make
  need g++ has g++
  need binutils has strip
  need pkg-config has pkg-config
  need libclang-dev has_libclang
  need git has git
  need curl has curl
  need ca-certificates has_ca
}

# Debian's `python3` makes folders for packages only with another package of its own.
test_packages() {
  need python3-venv python3 -c 'import venv, ensurepip'
}

cluster_packages() {
  need containerd has containerd
  need runc has runc
  need containernetworking-plugins has_cni
  need nftables has nft
  need iptables has iptables
  need conntrack has conntrack
  need kmod has modprobe
  need iproute2 has ip
  need util-linux has unshare
  need openssl has openssl
  need jq has jq
  need curl has curl
}

toolchains() { # COMMAND...
  for command in "$@"; do
    has "$command" >/dev/null || die "\`$command\` is not installed; see CONTRIBUTING.md for Rust and Go"
  done
}

case ${1-} in
  build) toolchains cargo; build_packages ;;
  test) test_packages ;;
  cluster) toolchains go; cluster_packages ;;
  *) die "usage: install.sh build|test|cluster" ;;
esac
[ ${#missing[@]} -gt 0 ] || exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
has apt-get >/dev/null || die "missing: ${missing[*]} (names of the Debian packages)"
[ "$(id -u)" = 0 ] || die "packages are missing; run: sudo apt-get update && sudo $install"
echo "installing: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2
# shellcheck disable=SC2086  # the words of the command
$install -qq >&2
