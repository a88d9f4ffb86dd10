#!/usr/bin/env bash
# Makes a Python with what `read.py` needs, unless it is in the cache already, and prints its path.
#
# The cache key is requirements.txt and Python's version; an old key's folder may be deleted.
set -euo pipefail
. "$(dirname "$0")/../cluster/env.sh"
requirements=$ROOT/e2e/outside/requirements.txt
command -v python3 >/dev/null || die "\`python3\` is not installed; run: e2e/cluster/install.sh test"
key=$({
  python3 -VV
  cat "$requirements"
} | sha256sum | cut -c1-16)
out=$CACHE/tools/outside-$key
if [ ! -e "$out/ready" ]; then
  echo "installing $(xargs <"$requirements") (once; later runs take it from $CACHE/tools)" >&2
  python3 -m venv --clear "$out" >&2
  "$out/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: -r "$requirements" >&2
  touch "$out/ready" # last: an installation that is interrupted is begun anew
fi
echo "$out/bin/python"
