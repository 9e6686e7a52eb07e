#!/usr/bin/env bash
# Builds the environment that ipex-llm's vLLM engine runs in: build.sh ENVIRONMENT PYTHON
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

fail() {
    echo "env-ipex-llm: $*" >&2
    exit 1
}

[[ $("$python" -c 'import sys; print(*sys.version_info[:2])') == "3 11" ]] ||
    fail "needs Python 3.11: name one with ENV_PYTHON=/path/to/python3.11"
command -v g++ >/dev/null || fail "needs a C++ compiler: apt-get install g++"

if ! echo '#include <numa.h>' | g++ -E -x c++ - >/dev/null 2>&1; then
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null ||
        fail "vLLM's CPU extension needs libnuma's headers: sudo apt-get install libnuma-dev"
    echo "installing libnuma-dev, which vLLM's CPU extension needs"
    apt-get update -qq
    apt-get install -y -qq libnuma-dev
fi

"$python" -m venv --clear "$environment"
# vLLM's build and ipex-llm's version check call python, pip and cmake by name.
export PATH="$(cd "$environment" && pwd)/bin:$PATH"
pip install --quiet --quiet --no-deps --no-compile -r "$here/requirements.lock"

torch=$(python -c 'import importlib.util as util; print(util.find_spec("torch").submodule_search_locations[0])')
if [[ -f $torch/lib/libtorch_cuda.so ]]; then
    # PyTorch's CUDA build loads 2.5 GB of CUDA libraries that a CPU never calls. Libraries of the same names and
    # symbols satisfy the loader; a call into one traps.
    undefined=$(nm -D --undefined-only "$torch"/lib/lib{torch_cpu,torch_cuda,torch_python}.so | awk '$1 == "U" {print $2}')
    stand_in() { # SONAME, names on stdin, further arguments for the linker
        sort -u | sed 's/.*/void &(void) { __builtin_trap(); }/' |
            gcc -shared -w -x c - -Wl,-soname,"$1" "${@:2}" -o "$torch/lib/$1"
    }
    for library in libcublas.so.12 libcublasLt.so.12 libcudnn.so.9 libcufft.so.11 libcusparse.so.12 libcupti.so.12; do
        sed -n "s/@$library\$//p" <<<"$undefined" |
            stand_in $library -Wl,--version-script=<(echo "$library {};")
    done
    stand_in libcurand.so.10 </dev/null
    sed -n '/^nccl[A-Z]/p' <<<"$undefined" | stand_in libnccl.so.2
    # This file looks for a CUDA toolkit; all that torch's other CMake files need from it is this target.
    echo 'add_library(torch::cudart INTERFACE IMPORTED)' >"$torch/share/cmake/Caffe2/public/cuda.cmake"
fi

# uv, because pip refuses a source release whose build adds "+cpu" to its version. AVX-512 would have the build clone
# oneDNN, which only vLLM's own int8 kernels use.
VLLM_TARGET_DEVICE=cpu VLLM_CPU_DISABLE_AVX512=true \
    uv pip install --quiet --python "$environment/bin/python" --no-deps --no-build-isolation \
    --no-binary vllm vllm==0.6.6.post1

python -c 'from ipex_llm.vllm.cpu.engine import IPEXLLMAsyncLLMEngine' >/dev/null
echo "$recipe" >"$stamp"
echo "$environment is ready"
