#!/usr/bin/env bash
# Builds the environment that FastChat's web server runs in: build.sh ENVIRONMENT PYTHON
# Does nothing when ENVIRONMENT was built from this very script and lock.
set -euo pipefail

environment=$1
python=$2
here=$(cd "$(dirname "$0")" && pwd)
stamp=$environment/.ready
recipe=$(cat "$here/requirements.lock" "$here/build.sh" | sha256sum)

if [[ -f $stamp && $(<"$stamp") == "$recipe" ]]; then
    echo "$environment is up to date"
    exit 0
fi

"$python" -m venv --clear "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile -r "$here/requirements.lock"
"$environment/bin/python" -c 'import fastchat.conversation, gradio'
echo "$recipe" >"$stamp"
echo "$environment is ready"
