#!/usr/bin/env bash
# Makes PyTorch's CUDA build usable without CUDA's libraries, in the first python of PATH. Leaves the CPU build alone.
#
# The CUDA build loads 2.5 GB of libraries that a CPU never calls. Libraries of the same names and symbols satisfy the
# loader; a call into one traps. Only libcudart is called while loading, and has to be installed.
set -euo pipefail

cd "$(python -c 'import importlib.util as util; print(util.find_spec("torch").submodule_search_locations[0])')/lib"
[[ -f libtorch_cuda.so ]] || exit 0

versions=$(mktemp)
trap 'rm "$versions"' EXIT
loaded=(libtorch_cpu.so libtorch_cuda.so libtorch_python.so)
undefined=$(nm -D --undefined-only "${loaded[@]}" | awk '$1 == "U" {print $2}' | sort -u)
for library in $(readelf -d "${loaded[@]}" | grep -oE '\[lib(cu|nccl|nv)[^]]*' | tr -d '[' | grep -v '^libcudart' | sort -u); do
    [[ -e $library ]] && continue # comes with torch itself
    prefix=${library#lib}
    symbols=$(sed -n "s/@$library\$//p" <<<"$undefined")
    options=(-shared -w -Wl,-soname,"$library")
    if [[ -n $symbols ]]; then
        echo "$library {};" >"$versions"
        options+=(-Wl,--version-script="$versions")
    else # told by their prefix; some libraries have none that are used
        symbols=$(grep -iE "^${prefix%%.*}[A-Z]" <<<"$undefined" | grep -v @ || true)
    fi
    sed '/./!d; s/.*/void &(void) { __builtin_trap(); }/' <<<"$symbols" | gcc "${options[@]}" -x c - -o "$library"
done
# This file looks for a CUDA toolkit; all that torch's other CMake files need from it is this target.
echo 'add_library(torch::cudart INTERFACE IMPORTED)' >../share/cmake/Caffe2/public/cuda.cmake
