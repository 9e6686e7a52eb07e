"""Builds the native kernels into the package; everything else about the package is in pyproject.toml.

Without a C++ compiler the package still installs, and `ipex_vllm.low_bit.native.unavailable_reason()` says so.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("ipex_vllm/low_bit/csrc")

FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
# GCC 12 warns about its own AVX-512 headers, which leave a register undefined on purpose.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS += [f"-I{CSRC}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl"]
AMX = ["-mamx-tile", "-mamx-int8"]
# Each file is compiled for the machine that its kernel is for; which one runs is decided at run time.
SOURCES = {
    CSRC / "common/cpu.cpp": [],
    CSRC / "w4a8/w4a8.cpp": [],
    CSRC / "w4a8/avx2.cpp": AVX2,
    CSRC / "w4a8/avx_vnni.cpp": [*AVX2, "-mavxvnni"],
    CSRC / "w4a8/avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
    CSRC / "w4a8/amx.cpp": [*AVX512, "-mavx512vnni", *AMX],
    CSRC / "w8a8/w8a8.cpp": [],
    CSRC / "w8a8/avx2.cpp": AVX2,
    CSRC / "w8a8/avx_vnni.cpp": [*AVX2, "-mavxvnni"],
    CSRC / "w8a8/avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
    CSRC / "w8a8/amx.cpp": [*AVX512, "-mavx512vnni", *AMX],
    CSRC / "w8a16/w8a16.cpp": [],
    CSRC / "w8a16/avx2.cpp": AVX2,
    CSRC / "w8a16/avx512.cpp": AVX512,
    CSRC / "w8a16/avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    CSRC / "w16a16/w16a16.cpp": [],
    CSRC / "w16a16/avx2.cpp": AVX2,
    CSRC / "w16a16/avx512.cpp": AVX512,
    CSRC / "experts/experts.cpp": [],
    # No fused multiplication but those that are written: every instruction set gives the same bits.
    CSRC / "experts/avx2.cpp": [*AVX2, "-ffp-contract=off"],
    CSRC / "experts/avx512.cpp": [*AVX512, "-ffp-contract=off"],
    CSRC / "rounding/rounding.cpp": [],
    CSRC / "rounding/avx2.cpp": [*AVX2, "-ffp-contract=off"],
    CSRC / "rounding/avx512.cpp": [*AVX512, "-ffp-contract=off"],
    CSRC / "torch_ops.cpp": ["-fexceptions", "-frtti"],
}


class BuildKernels(build_ext):
    """Compiles a plain shared library: no Python in it, and so no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for source, flags in SOURCES.items():
            try:
                objects += self._compile(source, flags)
            except CompileError:
                if not set(AMX) & set(flags):
                    raise
                # A compiler older than AMX (GCC 10): these files then only say that there is no such kernel.
                objects += self._compile(source, [flag for flag in flags if flag not in AMX])
        # No -fopenmp here: the library has to use the OpenMP runtime that torch brings, not one of its own.
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), target_lang="c++")

    def _compile(self, source: Path, flags: list[str]) -> list[str]:
        return self.compiler.compile([str(source)], self.build_temp, extra_postargs=FLAGS + flags)


kernels = Extension(
    "ipex_vllm.low_bit.libkernels",
    sources=[str(source) for source in SOURCES],
    depends=[str(header) for header in sorted(CSRC.rglob("*.h"))],
    optional=True,
)

if __name__ == "__main__":  # the tests read the table above, and compile its files for their drivers
    is_x86_linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    setup(ext_modules=[kernels] if is_x86_linux else [], cmdclass={"build_ext": BuildKernels})
