#!/usr/bin/env bash
# From a fresh checkout to a trained and evaluated model, on two CPU cores in about five minutes after
# the installation: creates .venv, trains SmolLM2-135M-Instruct with LoRA DPO on the pairs in
# data/quickstart_prefs, evaluates it on the held-out pairs, prints one table and lists the files it
# wrote. A second call prints the stored results.
#
#     bash quickstart.sh                      PYTHON=python3.12 bash quickstart.sh
#     bash quickstart.sh --overwrite          flags go to dpo_train_human_preference.py (its --help)
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=utils/env.sh
source utils/env.sh
answer_help_and_version quickstart.sh "$@"

prepare_environment
echo "training: dpo_train_human_preference.py --config configs/quickstart.yaml $*"
exec "$python" dpo_train_human_preference.py --config configs/quickstart.yaml "$@"
