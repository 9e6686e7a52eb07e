#!/usr/bin/env bash
# Builds one of the environments beside the main one: build.sh NAME ENVIRONMENT PYTHON
#
# NAME is a folder here: a requirements.lock and, where pip alone is not enough, scripts to run before and after it.
# An ENVIRONMENT that was built from these very files stays as it is, so that it can be kept between checkouts.
set -euo pipefail

name=$1
python=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$2"
environment=$(cd "$2" && pwd)

exec 9>"$environment.lock"
flock 9 # two builds at once would spoil each other's

# Before the check: what it installs lies outside the environment.
[[ ! -e $here/$name/before.sh ]] || "$here/$name/before.sh" "$python"

shopt -s nullglob # not every NAME has scripts
recipe=$(cat "$here"/*.sh "$here/$name"/*.{lock,sh} | sha256sum)
if [[ -x $environment/bin/python && -f $environment/.ready && $(<"$environment/.ready") == "$recipe" ]]; then
    echo "$environment is up to date"
    exit 0
fi

"$python" -m venv --clear "$environment"
# What is built in it calls python, pip and cmake by name.
export PATH="$environment/bin:$PATH"
pip install --quiet --quiet --no-deps --no-compile -r "$here/$name/requirements.lock"
[[ ! -e $here/$name/after.sh ]] || "$here/$name/after.sh"
# pip would compile on one core only; uncompiled, every start of a worker takes half a minute longer where Python may
# not write beside its sources. Some packages bring templates that are no valid Python.
python -m compileall -qq -j 0 "$environment/lib" || true
echo "$recipe" >"$environment/.ready"
echo "$environment is ready"
