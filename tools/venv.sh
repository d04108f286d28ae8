#!/bin/sh
# Makes the virtual environment and installs maxlm with the extras given, unless that is already done.
#
#     VENV=.venv PYTHON=python3.12 tools/venv.sh test,lint
#
# PYTHON is needed only to make the environment (default: python3); given for an existing one of another version, the
# environment is made again. What is installed is remembered in $VENV/installed-EXTRAS with a checksum of pyproject.toml
# and the constraints, so that a second call for the same or fewer extras does nothing and a change of either installs
# again.
set -eu
cd "$(dirname "$0")/.."

extras=${1:-}
venv=${VENV:-.venv}
mine=$venv/made-by-make
record=$venv/installed-${extras:-core}
made=

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Major.minor of a Python, or nothing when it does not run (a pyenv shim of a version not chosen does not).
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

supported() { case $1 in 3.11 | 3.12 | 3.13) true ;; *) false ;; esac; }

# The newest supported Python on PATH, to name in an error.
suggestion() {
    for name in python3.13 python3.12 python3.11; do
        if supported "$(version_of $name)"; then
            echo "set PYTHON=$name, which is installed here"
            return
        fi
    done
    echo "install one and set PYTHON=python3.12"
}

check_python() {
    version=$(version_of "$1")
    [ -n "$version" ] || fail "$1 does not run as a Python; maxlm needs Python 3.11 to 3.13: $(suggestion)"
    supported "$version" || fail "maxlm needs Python 3.11 to 3.13, but $1 is $version; $(suggestion)"
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$1 cannot make virtual environments (no ensurepip); on Debian and Ubuntu," \
            "install it with: sudo apt install python3-venv (or python$version-venv)"
}

# Whatever is wrong with the environment, it may be deleted only when this script made it.
discard() {
    [ -e "$mine" ] || fail "$venv $1 and was not made by make; move it away, or choose another place with VENV=..."
    echo "$venv $1; making it again"
    # Renamed first: a deletion cut short must leave nothing under the name.
    rm -rf "$venv.discarded"
    mv "$venv" "$venv.discarded"
    rm -rf "$venv.discarded"
}

python=$venv/bin/python
if [ -e "$venv" ]; then
    have=$(version_of "$python")
    want=${PYTHON:+$(version_of "$PYTHON")}
    if [ -n "${PYTHON:-}" ] && [ "$want" != "$have" ]; then
        check_python "$PYTHON"
        discard "has Python ${have:-none}, not $want"
    elif ! supported "$have"; then
        discard "has no supported Python (${have:-none runs})"
    elif ! "$python" -m pip --version >/dev/null 2>&1; then
        discard "has no working pip"
    elif [ -e "$mine" ] && [ "$(cat "$mine")" != "$(pwd)" ]; then
        discard "was made in another folder"
    fi
fi

if [ ! -e "$venv" ]; then
    base=${PYTHON:-python3}
    check_python "$base"
    echo "making $venv with Python $(version_of "$base")"
    made=yes
    trap 'status=$?; [ -z "$made" ] || rm -rf "$venv"; exit $status' EXIT
    trap 'exit 130' INT TERM HUP
    mkdir -p "$venv"
    pwd >"$mine"
    "$base" -m venv "$venv" || fail "$base -m venv failed; its message is above"
    made=
fi

constraints=constraints/py$(version_of "$python" | tr -d .).txt
inputs=$(cat pyproject.toml "$constraints" | cksum)
for other in "$venv"/installed-*; do
    if [ -e "$other" ] && [ "$(cat "$other")" = "$inputs" ]; then
        lacks=
        for extra in $(echo "$extras" | tr , ' '); do
            case ,${other##*/installed-}, in *,"$extra",*) ;; *) lacks=yes ;; esac
        done
        [ -n "$lacks" ] || exit 0
    fi
done

case $extras in
*oracles*) size="up to 850 MB to download with torch for CPU, 4 GB with torch for CUDA; several minutes" ;;
"") size="about 270 MB to download, 1.1 GB on disk; a minute or two" ;;
*) size="up to 550 MB to download, 2.1 GB on disk; a few minutes" ;;
esac
echo "installing maxlm${extras:+[$extras]} and its dependencies into $venv ($size)..."
rm -f "$record"
started=$(date +%s)
"$python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".${extras:+[$extras]}" ||
    fail "pip could not install; its message is above. Once it is mended, the same command goes on from here"
echo "$inputs" >"$record"
echo "installed in $(($(date +%s) - started)) s"
