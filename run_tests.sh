#!/usr/bin/env bash
# The whole test suite, in its own .venv. `--slow` adds what is too long for every commit; other arguments go to pytest.
#
#     bash run_tests.sh          bash run_tests.sh --slow          bash run_tests.sh -k preferences
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=utils/env.sh
source utils/env.sh

prepare_environment requirements/tests.txt
echo "lint: ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "tests: pytest $*"
"$python" -m pytest tests "$@"
