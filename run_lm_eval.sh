#!/usr/bin/env bash
# Run lm-evaluation-harness on the base and the tuned model: one table with paired tests. `--help` lists the flags.
#
#     bash run_lm_eval.sh                          # the quick suite on the latest run: offline, two minutes on 2 cores
#     bash run_lm_eval.sh --suite openllm_v1 --base-model google/gemma-2b-it --adapter-path checkpoints/gemma-2b-it-dpo
#
# Python is $PYTHON, else the activated virtual environment's, else that of .venv, which quickstart.sh creates.
set -euo pipefail
# Relative paths on the command line refer to the caller's folder, not to the repository.
INVOKED_FROM="$PWD" INVOKED_AS="run_lm_eval.sh"
export INVOKED_FROM INVOKED_AS
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

choose_python
# Without an import, which takes seconds; --help and --version need no package.
case "${1:-}" in
    -h | --help | --version) ;;
    *)
        "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("lm_eval"))' 2>/dev/null ||
            fail "$python has no lm-evaluation-harness: set PYTHON=.venv/bin/python (bash quickstart.sh creates it)," \
                "or pip install -r requirements.txt"
        ;;
esac
exec "$python" -m preflab.harness.run "$@"
