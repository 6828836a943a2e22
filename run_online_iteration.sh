#!/usr/bin/env bash
# One iteration of online preference training, with any loss and any scorer: the model answers its
# part of the prompts several times, a scorer ranks the answers, and the model is trained on the best
# and the worst answer of each prompt. The reference is the model at the start of the iteration.
#
#     bash run_online_iteration.sh 1 --name quickstart-sppo --loss sigmoid    # CPU, minutes
#     bash run_online_iteration.sh 1 --name quickstart-sppo --loss simpo --train "--beta 2"
#     bash run_online_iteration.sh 1 --name gemma-2-9b-it-sppo --loss sigmoid \
#         --scorer rm:Skywork/Skywork-Reward-V2-Llama-3.1-8B \
#         --launch configs/accelerate/deepspeed_zero3.yaml                     # 8 GPUs
#
# Iteration T reads CONFIGS/pairs/NAME.yaml (prompts, sampling, scorer) and CONFIGS/NAME-iterT.yaml
# (training; it names the model from iteration T-1). Both commands are printed before they run.
# Finished work is not repeated: after Ctrl-C or a crash, run the same command again to continue.
# Flags ([x] is the default):
#
#     --name NAME            the recipe
#     --loss "LOSS ..."      losses of --loss_type [the recipe's]
#     --scorer SCORER        what ranks the answers [the recipe's]: rm:MODEL, pair:MODEL, judge:...,
#                            FILE.py:FUNCTION and others (generate_preference_pairs.py --help)
#     --run_name RUN         the runs are RUN-iter1, RUN-iter2, ..., the pairs are in RUN-iter1-pairs
#                            [NAME; NAME-LOSS where --loss differs from the recipe's]
#     --configs DIR          folder of the recipe's YAML files [configs]
#     --launch YAML          train under accelerate launch with this config; the pairs are made by the
#                            same number of processes under configs/accelerate/multi_gpu.yaml, each
#                            with its own engine where vLLM generates (bash install_vllm.sh)
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
answer_help_and_version run_online_iteration.sh "$@"

iteration="$1" name="" configs=configs launch="" pairs="" train="" loss="" scorer="" run_name=""
[[ "$iteration" =~ ^[1-9][0-9]*$ ]] ||
    fail "iteration $iteration: the first argument must be the iteration's number, from 1; see --help"
shift
while [ $# -gt 0 ]; do
    case "$1" in
        --name | --loss | --scorer | --run_name | --configs | --launch | --pairs | --train)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --name=* | --loss=* | --scorer=* | --run_name=* | --configs=* | --launch=* | --pairs=* | --train=*)
            flag="${1%%=*}"
            printf -v "${flag#--}" %s "${1#*=}"
            shift
            ;;
        --*)
            fail "unknown flag $1: the flags are --name, --configs, --loss, --scorer, --run_name, --launch, --pairs" \
                "and --train; see --help"
            ;;
        *) fail "'$1' is not understood: only the iteration has no flag; quote the values of --pairs and --train" ;;
    esac
done
[ -n "$name" ] || fail "--name is missing: give quickstart-sppo, gemma-2-9b-it-sppo or your own recipe"
check_part_of_file_names() { # arguments: the flag, its value
    [[ "$2" =~ ^[A-Za-z0-9_][A-Za-z0-9_.\ -]*$ ]] ||
        fail "$1 ${2@Q}: only letters, digits, - _ and dots; it is part of file names"
}
check_part_of_file_names --name "$name"
[ -z "$run_name" ] || check_part_of_file_names --run_name "$run_name"
training="$configs/$name-iter$iteration.yaml" sampling="$configs/pairs/$name.yaml"
for flag in $pairs; do
    case "$flag" in
        --run_name* | --limit* | --eval_out*)
            fail "--pairs \"$flag ...\": training reads the folder of its dataset_name; use this script's --run_name" ;;
        --scorer*) [ -z "$scorer" ] || fail "--pairs \"$flag ...\": there is --scorer already; give one of them" ;;
    esac
done
for flag in $train; do
    case "$flag" in
        --loss_type*) [ -z "$loss" ] || fail "--train \"$flag ...\": there is --loss already; give one of them" ;;
        --run_name*) [ -z "$run_name$loss" ] || fail "--train \"$flag ...\": use this script's --run_name" ;;
    esac
done
for file in "$training" "$sampling" ${launch:+"$launch"}; do
    [ -f "$file" ] || fail "$file: no such file; iteration $iteration of --name $name needs it"
done

choose_python

# The value of a key of the training recipe, without quotes and comment.
recipe_value() { # argument: the key
    sed -n "s/^$1: *//p" "$training" | sed "s/ *#.*//; s/^[\"']//; s/[\"']\$//" | head -n 1
}

# Flags that make RUN-iterT out of the recipe's NAME-iterT: another loss gets other folders, and its iteration T continues
# from its iteration T-1.
pairs_flags=() train_flags=()
if [ -n "$loss" ]; then
    # Checked now: the answers would otherwise be sampled first.
    # shellcheck disable=SC2086
    "$python" -m preflab.training.loss_names $loss
    if [ "$loss" != "$(recipe_value loss_type)" ]; then
        # shellcheck disable=SC2206
        train_flags+=(--loss_type $loss)
        run_name="${run_name:-$name-${loss// /-}}"
    fi
fi
[ -z "$scorer" ] || pairs_flags+=(--scorer "$scorer")
if [ "${run_name:-$name}" != "$name" ]; then
    folder="$(recipe_value dataset_name)" previous="" flag=""
    for key in dataset_name model_name_or_path start_adapter; do
        value="$(recipe_value "$key")"
        [[ "$value" == *"$name-iter"* ]] || continue
        train_flags+=("--$key" "${value//"$name-iter"/"$run_name-iter"}")
        case "$key" in
            dataset_name) folder="${train_flags[-1]}" ;;
            *) previous="${train_flags[-1]}" flag="${key/start_adapter/adapter_path}" ;;
        esac
    done
    [[ "$folder" == *"$run_name-iter"* ]] ||
        fail "$training: its dataset_name must contain $name-iter$iteration, which --loss and --run_name replace by $run_name-iter$iteration"
    [ "$iteration" = 1 ] || [ -n "$previous" ] ||
        fail "$training: its model_name_or_path or start_adapter must contain $name-iter$((iteration - 1)), which --loss and --run_name replace by $run_name-iter$((iteration - 1))"
    train_flags+=(--run_name "$run_name-iter$iteration")
    pairs_flags+=(--run_name "$(basename "$folder")" --eval_out "$(dirname "$folder")")
    [ -z "$previous" ] || pairs_flags+=("--$flag" "$previous")
fi

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
    generate+=(-m accelerate.commands.launch --config_file "$generate_config" --num_processes "${processes:-1}")
fi
# shellcheck disable=SC2206
generate+=(generate_preference_pairs.py --config "$sampling" --training_config "$training" --part "$iteration" "${pairs_flags[@]}" $pairs)
# shellcheck disable=SC2206
train_command+=(dpo_train_human_preference.py --config "$training" "${train_flags[@]}" $train)
print_command "${generate[@]}"
run_and_forward "${generate[@]}"
print_command "${train_command[@]}"
exec "${train_command[@]}"
