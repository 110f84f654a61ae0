#!/usr/bin/env bash
# All of tests/ by two processes (or as many as the first argument says). What a process takes at a time is a file; those
# that take minutes come first. Projects that several files test are made by the first that asks, see `shared` in
# conftest.py. A file's output appears when it has ended; the last line names those that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
long=(pipeline flow same_bytes new kill registry bad_input grow verdict hostile cli compare stress engines debug candidates spread backbone texts runner)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export TESTS_SHARE="$logs/shared"
mkdir "$TESTS_SHARE"

run_file() {
  local log="$logs/${1//\//-}"
  pytest --durations=3 --durations-min=20 "$1" > "$log" 2>&1
  local code=$?
  flock "$logs" cat <(echo "── $1") "$log"
  [ "$code" -eq 0 ] || { echo "$1" >> "$logs/failed"; return 1; }
}
export -f run_file
export logs

{
  printf 'tests/test_%s.py\n' "${long[@]}"
  find tests -name 'test_*.py' | sort
} | awk '!seen[$0]++' | xargs -P "${1:-2}" -I FILE bash -c 'run_file "FILE"'
code=$?
[ ! -f "$logs/failed" ] || { echo "failed:"; cat "$logs/failed"; }
exit "$code"
