#!/usr/bin/env bash
# From a fresh checkout to a trained and evaluated model, on two CPU cores in about five minutes after
# the installation: creates .venv, trains SmolLM2-135M-Instruct with LoRA DPO on the pairs in
# data/quickstart_prefs, evaluates it on the held-out pairs, prints one table and lists the files it
# wrote, and ends with a report that opens in a browser. A second call prints the stored results.
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

# The report is of the folders that the training writes to.
folders=() argument=""
for word in "$@"; do
    case "$argument" in
        --eval_out | --eval-out) folders+=(--eval_out "$word") ;;
        --output_dir | --output-dir) folders+=(--checkpoints "$word") ;;
    esac
    case "$word" in
        --eval_out=* | --eval-out=*) folders+=(--eval_out "${word#*=}") ;;
        --output_dir=* | --output-dir=*) folders+=(--checkpoints "${word#*=}") ;;
    esac
    argument="$word"
done
# One process, so that a stop signal reaches the training.
exec "$python" -m utils.in_turn dpo_train_human_preference.py --config configs/quickstart.yaml "$@" \
    --then report.py ${folders[@]+"${folders[@]}"}
