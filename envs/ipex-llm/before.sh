#!/usr/bin/env bash
# What vLLM's CPU extension is compiled with: Python 3.11, a C++ compiler and libnuma's headers. before.sh PYTHON
set -euo pipefail

fail() {
    echo "env-ipex-llm: $*" >&2
    exit 1
}

[[ $("$1" -c 'import sys; print(*sys.version_info[:2])') == "3 11" ]] ||
    fail "needs Python 3.11: name one with ENV_PYTHON=/path/to/python3.11"
command -v g++ >/dev/null || fail "needs a C++ compiler: apt-get install g++"

if ! echo '#include <numa.h>' | g++ -E -x c++ - >/dev/null 2>&1; then
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null ||
        fail "vLLM's CPU extension needs libnuma's headers: sudo apt-get install libnuma-dev"
    echo "installing libnuma-dev, which vLLM's CPU extension needs"
    apt-get update -qq
    apt-get install -y -qq libnuma-dev
fi
