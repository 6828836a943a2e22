#!/usr/bin/env bash
# lm-evaluation-harness on base and tuned: one table of both, with paired tests. `bash run_lm_eval.sh --help` says all.
#
#     bash run_lm_eval.sh                          # the quick suite on the latest run: offline, two minutes on 2 cores
#     bash run_lm_eval.sh --suite openllm_v1 --base-model google/gemma-2b-it --adapter-path checkpoints/gemma-2b-it-dpo
#
# Python is $PYTHON, else the active environment's, else that of .venv, which quickstart.sh makes.
set -euo pipefail
INVOKED_FROM="$PWD"
export INVOKED_FROM
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -n "${PYTHON:-}" ]; then
    python="$PYTHON"
elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
"$python" -c 'import lm_eval' 2>/dev/null || {
    echo "error: $python has no lm-evaluation-harness: bash quickstart.sh makes .venv with it, or pip install -r requirements.txt" >&2
    exit 2
}
exec "$python" -m preflab.harness.run "$@"
