#!/usr/bin/env bash
# Lint and the test suite, in the repository's .venv, on two processes. Flags:
#
#     --fast      leave out the tests that run scripts (the inner loop of a change)
#     --slow      add those that are too long for every commit
#
# Other arguments go to pytest; with a path, only its tests run:
#
#     bash run_tests.sh                              bash run_tests.sh tests/utils/test_cli.py
#     bash run_tests.sh --fast                       bash run_tests.sh -k preferences
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=utils/env.sh
source utils/env.sh
answer_help_and_version run_tests.sh "$@"

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then arguments+=(-m "not e2e"); else arguments+=("$argument"); fi
done

prepare_environment requirements/tests.txt
[ -f .gguf-tools/stamp ] || echo "GGUF: llama.cpp is not installed (bash install_gguf.sh), so its tests are skipped"
echo "lint: ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "tests: pytest $*"
# Without a path, pytest takes `testpaths` of pyproject.toml.
"$python" -m pytest -n 2 --dist worksteal --durations=10 ${arguments[@]+"${arguments[@]}"}
