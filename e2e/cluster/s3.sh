#!/usr/bin/env bash
# Runs real S3 servers for tests and development: versitygw over a folder, or MinIO with S3_SERVER=minio.
#
#   s3.sh start NAME ADDRESS BUCKET...   starts a server on a free port and makes the buckets; a server of that name
#                                        that was stopped gets its old program, port, keys and data
#   s3.sh stop NAME                      stops it; the data stays
#   s3.sh remove NAME                    stops it and deletes the data
#   s3.sh env NAME                       prints the lines to `eval`: endpoint, region, keys and first bucket
#   s3.sh run COMMAND...                 runs a command beside a server of its own, with those variables set
#
# A server listens on its one address only, with keys that are made at its first start.
set -euo pipefail
. "$(dirname "$0")/env.sh"
SERVER=${S3_SERVER:-versitygw}
REGION=us-east-1
EMPTY_SHA256=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855

folder() { echo "$STATE_HOME/s3/$1"; }
random() { # LENGTH
  LC_ALL=C tr -dc A-Za-z0-9 </dev/urandom | head -c "$1" || true
}

free_port() { # ADDRESS
  for port in $(seq 2910 2999); do
    (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null || { echo "$port"; return; }
  done
  die "no free port from 2910 to 2999 on $1"
}

settings() { # NAME ADDRESS BUCKET: makes them once, sets the variables
  local dir
  dir=$(folder "$1")
  mkdir -p "$dir/data"
  chmod 700 "$dir"
  [ -s "$dir/env" ] || cat >"$dir/env" <<Y
export S3_SERVER=$SERVER
export KALAMDB_TEST_S3_ENDPOINT=http://$2:$(free_port "$2")
export KALAMDB_TEST_S3_REGION=$REGION
export KALAMDB_TEST_S3_ACCESS_KEY=$(random 20)
export KALAMDB_TEST_S3_SECRET_KEY=$(random 40)
export KALAMDB_TEST_S3_BUCKET=$3
Y
  # shellcheck disable=SC1091
  . "$dir/env"
  SERVER=$S3_SERVER
}

signed() { # METHOD PATH: prints the HTTP status
  curl -s -o /dev/null -w '%{http_code}' -m 5 -X "$1" --aws-sigv4 "aws:amz:$REGION:s3" \
    --user "$KALAMDB_TEST_S3_ACCESS_KEY:$KALAMDB_TEST_S3_SECRET_KEY" \
    -H "x-amz-content-sha256: $EMPTY_SHA256" "$KALAMDB_TEST_S3_ENDPOINT$2"
}
# With a signature, so that another server on the port does not pass for ours.
answers() { [ "$(signed GET /)" = 200 ]; }

launch() { # FOLDER
  local binary listen=${KALAMDB_TEST_S3_ENDPOINT#http://}
  binary=$("$HERE/build.sh" "$SERVER")
  case $SERVER in
    versitygw)
      ROOT_ACCESS_KEY=$KALAMDB_TEST_S3_ACCESS_KEY ROOT_SECRET_KEY=$KALAMDB_TEST_S3_SECRET_KEY \
        setsid "$binary" --port "$listen" --region "$REGION" --quiet posix "$1/data" </dev/null >>"$1/log" 2>&1 &
      ;;
    minio)
      # It makes a folder for certificates in HOME, whatever it is told.
      HOME=$1 MINIO_ROOT_USER=$KALAMDB_TEST_S3_ACCESS_KEY MINIO_ROOT_PASSWORD=$KALAMDB_TEST_S3_SECRET_KEY \
        MINIO_REGION=$REGION MINIO_UPDATE=off MINIO_BROWSER=off \
        setsid "$binary" server --quiet --address "$listen" "$1/data" </dev/null >>"$1/log" 2>&1 &
      ;;
    *) die "no S3 server \`$SERVER\`; there are versitygw and minio" ;;
  esac
  echo $! >"$1/pid"
}

start() { # NAME ADDRESS BUCKET...
  local name=$1 dir bucket status
  dir=$(folder "$name")
  settings "$1" "$2" "${3-}"
  shift 2
  if ! is_ours "$(cat "$dir/pid" 2>/dev/null)" "$dir/data"; then launch "$dir"; fi
  (wait_for 30 "S3 server $name at $KALAMDB_TEST_S3_ENDPOINT" answers) || {
    tail -n 5 "$dir/log" >&2
    exit 1
  }
  for bucket in "$@"; do
    status=$(signed PUT "/$bucket") || true
    case $status in
      200 | 409) ;; # made, or there already
      *) die "bucket \`$bucket\` could not be made: HTTP $status; see $dir/log" ;;
    esac
  done
}

stop() { # NAME
  local dir pid
  dir=$(folder "$1")
  pid=$(cat "$dir/pid" 2>/dev/null) || return 0
  if is_ours "$pid" "$dir/data"; then
    kill "$pid"
    (wait_for 10 "the end of S3 server $1" test ! -d "/proc/$pid") || kill -KILL "$pid"
  fi
  rm -f "$dir/pid"
}

remove() { # NAME
  stop "$1"
  rm -rf "$(folder "$1")"
  rmdir "$STATE_HOME/s3" "$STATE_HOME" 2>/dev/null || true
}

# Servers of `run`s that were killed carry their process id in their name.
remove_stale() {
  for dir in "$STATE_HOME"/s3/run-*; do
    [ -d "$dir" ] || continue
    is_ours "${dir##*-}" s3.sh || remove "${dir##*/}"
  done
}

run() { # COMMAND...
  remove_stale
  # shellcheck disable=SC2064  # the name as of now
  trap "remove run-$$" EXIT
  start "run-$$" 127.0.0.1 kalamdb-test
  "$@"
}

command=${1-}
[ $# -gt 1 ] || die "usage: s3.sh start|stop|remove|env|run ...; the first lines of $0 explain"
shift
case $command in
  start) start "$@" ;;
  stop) stop "$1" ;;
  remove) remove "$1" ;;
  env) cat "$(folder "$1")/env" ;;
  run) run "$@" ;;
  *) die "no command \`$command\`" ;;
esac
