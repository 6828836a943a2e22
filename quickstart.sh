#!/usr/bin/env bash
# From a bare machine to a trained and evaluated model, on two CPU cores in under ten minutes after the install:
# makes .venv, trains SmolLM2-135M-Instruct with LoRA DPO on the pairs in data/quickstart_prefs, evaluates it on the
# held-out pairs, prints one table and lists what it wrote. Run twice, it reuses what is there.
#
#     bash quickstart.sh                      PYTHON=python3.12 bash quickstart.sh
#     bash quickstart.sh --overwrite          flags go to dpo_train_human_preference.py
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=utils/env.sh
source utils/env.sh

prepare_environment
echo "training: dpo_train_human_preference.py --config configs/quickstart.yaml $*"
"$python" dpo_train_human_preference.py --config configs/quickstart.yaml "$@"
