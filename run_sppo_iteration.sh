#!/usr/bin/env bash
# One SPPO iteration (Wu et al. 2024): the model answers its share of the prompts several times, a scorer ranks the
# answers, and the model is trained on the best and the worst of each with the soft loss, against itself as it was.
#
#     bash run_sppo_iteration.sh 1 --name quickstart-sppo          # CPU, minutes; then 2 and 3
#     bash run_sppo_iteration.sh 1 --name gemma-2-9b-it-sppo --launch configs/accelerate/deepspeed_zero3.yaml   # 8 GPUs
#
# Iteration T reads CONFIGS/pairs/NAME.yaml (prompts, sampling, scorer) and CONFIGS/NAME-iterT.yaml (training; it names the
# model that iteration T-1 left). Both commands are printed as they would be typed by hand. What is finished is not done
# again; after Ctrl-C or a crash the same command goes on. Flags:
#
#     --name NAME          the recipe                     --configs DIR       where its YAML files are (default: configs)
#     --launch YAML        train under accelerate launch with this config; the pairs are made by as many processes on
#                          configs/accelerate/multi_gpu.yaml, or by one where vLLM generates
#     --pairs "FLAGS"      further flags of generate_preference_pairs.py
#     --train "FLAGS"      further flags of dpo_train_human_preference.py
#
# Python is $PYTHON, else the active environment's, else that of .venv, which quickstart.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

iteration="${1:-}" name="" configs=configs launch="" pairs="" train=""
if [ -z "$iteration" ] || [ "$iteration" = --help ] || [ "$iteration" = -h ]; then
    sed -n '2,/^set -euo/{/^set -euo/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ "$iteration" =~ ^[1-9][0-9]*$ ]] || fail "iteration $iteration: give its number first, from 1 (--help says more)"
shift
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || fail "$1 needs a value (--help says more)"
    case "$1" in
        --name) name="$2" ;;
        --configs) configs="$2" ;;
        --launch) launch="$2" ;;
        --pairs) pairs="$2" ;;
        --train) train="$2" ;;
        *) fail "unknown flag $1 (--help lists them)" ;;
    esac
    shift 2
done
[ -n "$name" ] || fail "--name is missing: quickstart-sppo, gemma-2-9b-it-sppo, or a recipe of your own"
training="$configs/$name-iter$iteration.yaml" sampling="$configs/pairs/$name.yaml"
for flag in $pairs; do
    case "$flag" in
        --run_name* | --limit* | --eval_out*)
            fail "--pairs \"$flag ...\": the training reads the folder that its dataset_name names; change both YAML files" ;;
    esac
done
for file in "$training" "$sampling" ${launch:+"$launch"}; do
    [ -f "$file" ] || fail "$file is not there: iteration $iteration of --name $name needs it"
done

choose_python

say_and_run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

generate=("$python") fit=("$python")
if [ -n "$launch" ]; then
    fit+=(-m accelerate.commands.launch --config_file "$launch")
    # Sharded training states nothing about answering but how many processes there are.
    processes=$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$launch")
    on=configs/accelerate/multi_gpu.yaml
    ! grep -q '^use_cpu: *true' "$launch" || on="$launch"
    # vLLM drives all GPUs from one process.
    "$python" -c 'import vllm' 2>/dev/null ||
        generate+=(-m accelerate.commands.launch --config_file "$on" --num_processes "${processes:-1}")
fi
# shellcheck disable=SC2086
say_and_run "${generate[@]}" generate_preference_pairs.py --config "$sampling" --training_config "$training" \
    --part "$iteration" $pairs
# shellcheck disable=SC2086
say_and_run "${fit[@]}" dpo_train_human_preference.py --config "$training" $train
