#!/usr/bin/env bash
# Does everything run on this machine's GPU? Every stage on the builtin model, kill and resume, training on random models
# of real shapes beside the planned memory, speed beside stock TRL: one JSON and one Markdown page, in at most 9 minutes.
# It needs no network, and works with other versions of torch than the pinned one as far as they go.
#
#     bash benchmarks/gpu_acceptance.sh                       # writes eval_out/gpu_acceptance/
#     bash benchmarks/gpu_acceptance.sh --minutes 20          # more time for the largest models
#     bash benchmarks/gpu_acceptance.sh --only dpo_lora kill_and_resume
#     bash benchmarks/gpu_acceptance.sh --device cpu          # the same steps without a GPU, as far as they go
#
# Uses the interpreter of $PYTHON, else of the activated virtual environment, else of .venv (created by quickstart.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=../utils/env.sh
source utils/env.sh
answer_help_and_version benchmarks/gpu_acceptance.sh "$@"
choose_python
exec "$python" benchmarks/gpu_acceptance.py "$@"
