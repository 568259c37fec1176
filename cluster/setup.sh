#!/usr/bin/env bash
# Prepares one machine (laptop or cluster node): system libraries for headless MuJoCo, a venv, the pinned requirements.
# Usage: cluster/setup.sh VENV [EXTRA]     e.g. cluster/setup.sh .venv dev
# Does nothing when the venv already matches the requirements. Set PYTHON to choose the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: cluster/setup.sh VENV [EXTRA]}
extra=${2:-}
log=$(mktemp)
say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$1"; exit 1; }
run() { "$@" >>"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "'$*' failed; the whole output is in $log"; }; }

# --- system packages: GL for headless rendering, libGL and glib for OpenCV, a compiler for one dependency (evdev)
packages=(libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6 libgl1 libglib2.0-0 gcc libc6-dev linux-libc-dev)
install() { # PACKAGE...: those that are missing, through apt when we may, else one line that says what to do
    local missing=() package
    command -v dpkg-query >/dev/null || { say "not a Debian or Ubuntu machine: make sure you have $*"; return; }
    for package in "$@"; do
        # Newer releases rename a library that gets a 64-bit time_t: libglib2.0-0 became libglib2.0-0t64.
        { dpkg-query -W -f='${Status}\n' "$package" "${package}t64" 2>/dev/null || true; } | grep -q 'install ok installed' || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    if [ "$(id -u)" = 0 ]; then as_root=(env); elif sudo -n true 2>/dev/null; then as_root=(sudo -n); else
        fail "please install the system packages first: sudo apt-get install -y ${missing[*]}"
    fi
    say "installing system packages: ${missing[*]}"
    run "${as_root[@]}" apt-get update -q
    run "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}
# A browser for the tests of the live page; Ubuntu's package of this name is none.
if [ "$extra" = dev ] && grep -qx 'ID=debian' /etc/os-release 2>/dev/null; then packages+=(chromium); fi
install "${packages[@]}"

# --- Python
series='3\.(11|12)'
series_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3 python; do
        if command -v "$candidate" >/dev/null && [[ $(series_of "$candidate") =~ ^$series$ ]]; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "Python 3.11 or 3.12 is needed and was not found: install one with its venv and headers (python3.11-venv python3.11-dev), or set PYTHON"
version=$(series_of "$python" || true)
[[ $version =~ ^$series$ ]] || fail "PYTHON=$python is ${version:+Python }${version:-no Python that runs}: set it to Python 3.11 or 3.12"

if [ -e "$venv" ] || [ -L "$venv" ]; then
    there=$(series_of "$venv/bin/python" || true)
    if ! [[ $there =~ ^$series$ ]] || { [ -n "${PYTHON:-}" ] && [ "$there" != "$version" ]; }; then
        [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is no virtual environment: move it away, or set VENV to another folder"
        if [ -n "${PYTHON:-}" ]; then wanted=$version; else wanted='3.11 or 3.12'; fi
        say "$venv is of ${there:+Python }${there:-a Python that is gone}, not of Python $wanted: setting it up anew"
        rm -rf "$venv"
    fi
fi
if ! [ -e "$venv/bin/python" ]; then
    "$python" -c 'import ensurepip, os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
        install "python$version-venv" "python$version-dev"
fi

stamp=$(cat requirements.txt pyproject.toml | sha256sum | cut -c1-16)
present=$(cat "$venv/.cosmos_ray" 2>/dev/null || true)
# dev has every extra, and every extra has the requirements.
if [ "$present" != "$stamp $extra" ] && [ "$present" != "$stamp dev" ] && { [ -n "$extra" ] || [ "${present%% *}" != "$stamp" ]; }; then
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "creating $venv"
        rm -rf "$venv"
        run "$python" -m venv "$venv"
    fi
    say "installing Python packages into $venv (a few minutes the first time)"
    run "$venv/bin/python" -m pip install -q --upgrade pip setuptools wheel
    ("$venv/bin/python" -m pip install -q -r requirements.txt -e ".${extra:+[$extra]}" >>"$log" 2>&1) &
    pip=$!
    trap 'kill $pip 2>/dev/null; exit 130' INT TERM
    while kill -0 "$pip" 2>/dev/null; do sleep 1; if [ -t 2 ]; then printf '\rsetup: %4d s, %s in the venv' "$SECONDS" "$(du -sh "$venv" 2>/dev/null | cut -f1)" >&2; fi; done
    [ -t 2 ] && printf '\n' >&2
    wait "$pip" || { tail -n 20 "$log" >&2; fail "pip failed; the whole output is in $log"; }
    printf '%s %s' "$stamp" "$extra" >"$venv/.cosmos_ray"
    say "ready after $SECONDS s"
fi
rm -f "$log"
