#!/usr/bin/env bash
# One SPPO iteration (Wu et al. 2024, arXiv 2405.00675): the model answers its part of the prompts
# several times, a scorer ranks the answers, and the model is trained on the best and worst answer of
# each prompt with SPPO's loss. The reference is the model at the start of the iteration.
#
#     bash run_sppo_iteration.sh 1 --name quickstart-sppo          # CPU, minutes; then 2 and 3
#     bash run_sppo_iteration.sh 1 --name gemma-2-9b-it-sppo \
#         --launch configs/accelerate/deepspeed_zero3.yaml         # 8 GPUs
#
# Iteration T reads CONFIGS/pairs/NAME.yaml (prompts, sampling, scorer) and CONFIGS/NAME-iterT.yaml
# (training; it names the model from iteration T-1). Both commands are printed before they run.
# Finished work is not repeated: after Ctrl-C or a crash, run the same command again to continue.
# Flags ([x] is the default):
#
#     --name NAME            the recipe
#     --configs DIR          folder of its YAML files [configs]
#     --launch YAML          train under accelerate launch with this config; the pairs are made by the
#                            same number of processes under configs/accelerate/multi_gpu.yaml, or by
#                            one process if vLLM is installed
#     --pairs "FLAGS"        further flags of generate_preference_pairs.py
#     --train "FLAGS"        further flags of dpo_train_human_preference.py
#
# Uses the interpreter of $PYTHON, else of the activated virtual environment, else of .venv (created
# by quickstart.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

# A call without arguments prints the help too.
[ $# -gt 0 ] || set -- --help
answer_help_and_version run_sppo_iteration.sh "$@"

iteration="$1" name="" configs=configs launch="" pairs="" train=""
[[ "$iteration" =~ ^[1-9][0-9]*$ ]] ||
    fail "iteration $iteration: the first argument must be the iteration's number, from 1; see --help"
shift
while [ $# -gt 0 ]; do
    case "$1" in
        --name | --configs | --launch | --pairs | --train)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --name=* | --configs=* | --launch=* | --pairs=* | --train=*)
            flag="${1%%=*}"
            printf -v "${flag#--}" %s "${1#*=}"
            shift
            ;;
        --*) fail "unknown flag $1: the flags are --name, --configs, --launch, --pairs and --train; see --help" ;;
        *) fail "'$1' is not understood: only the iteration has no flag; quote the values of --pairs and --train" ;;
    esac
done
[ -n "$name" ] || fail "--name is missing: give quickstart-sppo, gemma-2-9b-it-sppo or your own recipe"
[[ "$name" =~ ^[A-Za-z0-9_][A-Za-z0-9_.\ -]*$ ]] || fail "--name ${name@Q}: only letters, digits, - _ and dots; it is part of file names"
training="$configs/$name-iter$iteration.yaml" sampling="$configs/pairs/$name.yaml"
for flag in $pairs; do
    case "$flag" in
        --run_name* | --limit* | --eval_out*)
            fail "--pairs \"$flag ...\": training reads the folder of its dataset_name; change both YAML files" ;;
    esac
done
for file in "$training" "$sampling" ${launch:+"$launch"}; do
    [ -f "$file" ] || fail "$file: no such file; iteration $iteration of --name $name needs it"
done

choose_python

print_command() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

# Run a command to which Ctrl-C and the signals of a cluster are passed on: without that, bash would end alone.
run_and_forward() {
    local child code=0 name
    # Job control: without it bash starts background commands with Ctrl-C ignored.
    set -m
    "$@" &
    child=$!
    set +m
    for name in INT TERM USR1; do
        # shellcheck disable=SC2064
        trap "kill -$name $child 2>/dev/null || true" "$name"
    done
    wait "$child" || code=$?
    # A trap ends `wait` before the command has ended.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap - INT TERM USR1
    [ "$code" -eq 0 ] || exit "$code"
}

generate=("$python") train_command=("$python")
if [ -n "$launch" ]; then
    train_command+=(-m accelerate.commands.launch --config_file "$launch")
    # Generation is not sharded: of the training's launch config only the number of processes applies.
    processes=$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$launch")
    generate_config=configs/accelerate/multi_gpu.yaml
    ! grep -q '^use_cpu: *true' "$launch" || generate_config="$launch"
    # vLLM uses all GPUs from one process.
    "$python" -c 'import vllm' 2>/dev/null ||
        generate+=(-m accelerate.commands.launch --config_file "$generate_config" --num_processes "${processes:-1}")
fi
# shellcheck disable=SC2206
generate+=(generate_preference_pairs.py --config "$sampling" --training_config "$training" --part "$iteration" $pairs)
# shellcheck disable=SC2206
train_command+=(dpo_train_human_preference.py --config "$training" $train)
print_command "${generate[@]}"
run_and_forward "${generate[@]}"
print_command "${train_command[@]}"
exec "${train_command[@]}"
