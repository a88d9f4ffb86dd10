#!/usr/bin/env bash
# Starts one query pod on the manifests of this folder, prints what to do with it, and stays in the foreground until it is
# stopped (Ctrl-C). `make run` builds first and calls this.
#
#   KALAMDB_DATA    data folder (default: .kalamdb in the repository)
#   KALAMDB_LISTEN  address (default: 127.0.0.1:2900)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
server=${CARGO_TARGET_DIR:?is set by make run}/debug/kalamdb-query-pod
data=${KALAMDB_DATA:-.kalamdb}
listen=${KALAMDB_LISTEN:-127.0.0.1:2900}
ready_secs_max=30

die() {
  echo "error: $*" >&2
  exit 1
}

# Before the start, because the server opens its data folder first and would report the port last.
refuse_taken_port() {
  (exec 3<>"/dev/tcp/${listen%:*}/${listen##*:}") 2>/dev/null || return 0
  local what='another program'
  if curl -s -o /dev/null -m 2 -f "http://$listen/livez"; then
    what='a server that is already running'
  fi
  die "$listen is taken by $what; stop it, or choose another address: KALAMDB_LISTEN=127.0.0.1:2901 make run"
}

await_ready() {
  local deadline=$((SECONDS + ready_secs_max))
  until curl -s -o /dev/null -m 2 -f "http://$listen/readyz"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      local code=0
      wait "$pid" || code=$?
      echo "error: the server ended; its last lines say why" >&2
      exit "$((code > 0 ? code : 1))"
    fi
    if ((SECONDS >= deadline)); then
      kill -TERM "$pid"
      wait "$pid" || true
      die "the server was not ready after $ready_secs_max s"
    fi
    sleep 0.1
  done
}

# The line that reads a file with what this machine has.
reader() {
  local file="\"\$(find '$data/files/users/alice' -name '*.parquet' | head -n 1)\""
  local arrow="python3 -c 'import sys, pyarrow.parquet as p; print(p.ParquetFile(sys.argv[1]).read().to_pylist())' $file"
  if command -v duckdb >/dev/null; then
    echo "duckdb -c \"SELECT * FROM read_parquet('$data/files/users/alice/**/*.parquet')\""
  elif python3 -c 'import duckdb' 2>/dev/null; then
    echo "python3 -c 'import sys, duckdb; print(duckdb.read_parquet(sys.argv[1]))' $file"
  elif python3 -c 'import pyarrow' 2>/dev/null; then
    echo "$arrow"
  else
    # Debian lets pip install into such a folder only.
    echo "$arrow   # after: python3 -m venv /tmp/venv && . /tmp/venv/bin/activate && pip install pyarrow"
  fi
}

next_steps() {
  local alice bob
  alice=$("$server" token --data-dir "$data" --user alice)
  bob=$("$server" token --data-dir "$data" --user bob)
  cat <<Y

KalamDB is ready at http://$listen, with the tables of examples/quickstart and its data in $data.
Paste these lines into another terminal.

# Two users of the same table, app.messages.
ALICE=$alice
BOB=$bob
sql() { curl -sS http://$listen/v1/api/sql -H "Authorization: Bearer \$1" -H 'Content-Type: application/json' -d "\$2"; echo; }

# Both write.
sql \$ALICE '{"sql": "INSERT INTO app.messages (body, price) VALUES (\$1, \$2)", "params": ["alice was here", "1.2345"]}'
sql \$BOB   '{"sql": "INSERT INTO app.messages (body, price) VALUES (\$1, \$2)", "params": ["bob was here", "99.5"]}'

# Each sees only his own rows.
sql \$ALICE '{"sql": "SELECT id, body, price, created_at FROM app.messages"}'
sql \$BOB   '{"sql": "SELECT id, body, price, created_at FROM app.messages"}'

# From the buffer to Parquet files, one folder per user.
sql \$ALICE '{"sql": "STORAGE FLUSH TABLE app.messages"}'
sql \$BOB   '{"sql": "STORAGE FLUSH TABLE app.messages"}'
find '$data/files/users' -name '*.parquet'

# Any Parquet reader reads them.
$(reader)

A manifest that is edited or added in examples/quickstart/ is served within a second. Ctrl-C stops the server; the data stays.

Y
}

[[ -x $server ]] || die "there is no server at $server; \`make run\` builds it"
refuse_taken_port
mkdir -p "$data"
data=$(cd "$data" && pwd)

"$server" standalone --data-dir "$data" --manifests "$here" --listen "$listen" &
pid=$!
stopping=0
trap 'stopping=1; kill -TERM "$pid" 2>/dev/null || true' INT TERM HUP
await_ready
next_steps

# A signal ends `wait` early; the server then finishes what is under way, and its code is asked for again.
while :; do
  stopping=0 code=0
  wait "$pid" || code=$?
  ((stopping)) || exit "$code"
done
