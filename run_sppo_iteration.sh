#!/usr/bin/env bash
# One SPPO iteration (Wu et al. 2024, arXiv 2405.00675): the model answers its part of the prompts
# several times, a scorer ranks the answers, and the model is trained on the best and worst answer of
# each prompt with SPPO's loss. The reference is the model at the start of the iteration.
#
#     bash run_sppo_iteration.sh 1 --name quickstart-sppo          # CPU, minutes; then 2 and 3
#     bash run_sppo_iteration.sh 1 --name gemma-2-9b-it-sppo \
#         --launch configs/accelerate/deepspeed_zero3.yaml         # 8 GPUs
#
# It is run_online_iteration.sh with the recipe's own loss and scorer, and takes the same flags; see
# bash run_online_iteration.sh --help. The ones that matter here ([x] is the default):
#
#     --name NAME            the recipe
#     --configs DIR          folder of its YAML files [configs]
#     --launch YAML          train under accelerate launch with this config
#     --pairs "FLAGS"        further flags of generate_preference_pairs.py
#     --train "FLAGS"        further flags of dpo_train_human_preference.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

# A call without arguments prints the help too.
[ $# -gt 0 ] || set -- --help
answer_help_and_version run_sppo_iteration.sh "$@"
exec bash run_online_iteration.sh "$@"
