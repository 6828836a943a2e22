#!/usr/bin/env bash
# Check this machine before a long run: every line is ok, or says what to do. Exit code 1 if something
# must be fixed.
#
#     bash doctor.sh                                    # Python, packages, GPU, memory, disk, hub
#     bash doctor.sh --config configs/gemma-2b-it-dpo.yaml     # and what this recipe needs
#     bash doctor.sh --clean                            # list caches and locks of ended processes
#     bash doctor.sh --clean --yes                      # and delete them
#
#   --checkpoints FOLDER [checkpoints]   where runs are
#   --eval_out FOLDER [eval_out]         where results are
#   --offline                            leave out the hub
#
# Nothing is installed and no weights are downloaded. Python is $PYTHON, else the activated virtual
# environment's, else that of .venv.
set -euo pipefail
INVOKED_FROM="$PWD"
export INVOKED_FROM
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

answer_help_and_version doctor.sh "$@"
choose_python
check_python "$python"
exec "$python" -m preflab.doctor.run "$@"
