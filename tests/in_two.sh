#!/usr/bin/env bash
# All of tests/ by two processes (or as many as the first argument says). What a process takes at a time is a file, or a
# group of files that share the pipeline of conftest.py: each group runs that pipeline once, about a minute, so there are
# two of them and no more. A group's output appears when it has ended; the last line names those that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
groups=(
  "tests/test_bad_input.py tests/test_cli.py tests/test_report.py"
  "tests/test_kill.py tests/test_pipeline.py tests/test_same_bytes.py"
)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

run_group() { # the files of a group, as one word
  local log="$logs/${1//[\/ ]/-}"
  # shellcheck disable=SC2086
  pytest --durations=3 --durations-min=20 $1 > "$log" 2>&1
  local code=$?
  flock "$logs" cat <(echo "── $1") "$log"
  [ "$code" -eq 0 ] || { echo "$1" >> "$logs/failed"; return 1; }
}
export -f run_group
export logs

{
  printf '%s\n' "${groups[@]}"
  find tests -name 'test_*.py' | sort | grep -vxFf <(printf '%s\n' "${groups[@]}" | tr ' ' '\n')
} | xargs -P "${1:-2}" -I FILES bash -c 'run_group "FILES"'
code=$?
[ ! -f "$logs/failed" ] || { echo "failed:"; cat "$logs/failed"; }
exit "$code"
