#!/usr/bin/env bash
# The test suite, in its own .venv, on two processes. `--fast` leaves out the tests that run scripts (the inner loop of a
# change), `--slow` adds those that are too long for every commit; other arguments go to pytest.
#
#     bash run_tests.sh      bash run_tests.sh --fast      bash run_tests.sh --slow      bash run_tests.sh -k preferences
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=utils/env.sh
source utils/env.sh

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then arguments+=(-m "not e2e"); else arguments+=("$argument"); fi
done

prepare_environment requirements/tests.txt
echo "lint: ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "tests: pytest $*"
"$python" -m pytest tests -n 2 --dist worksteal --durations=10 ${arguments[@]+"${arguments[@]}"}
