"""The C++ library: it builds or says what is missing, uses torch's threads, and stays within its buffers."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.kernels import w4a8, w8a8, w8a16, w16a16

ROOT = Path(__file__).parents[1]
CPU_FLAGS = Path("/proc/cpuinfo").read_text().split()
BUILD = runpy.run_path(str(ROOT / "setup.py"))

# AVX-512 has AVX-VNNI's one instruction in another encoding: such a CPU runs that kernel's source, too.
OTHER_ENCODING = ["-mavx512vl", "-mavx512vnni", "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32"]
# What a CPU has to name for each kernel's instruction sets; the sources of AVX-VNNI run on two kinds.
ISA_FLAGS = {
    "w4a8": [{"avx2"}, {"avx_vnni", "avx512_vnni"}, {"avx512_vnni"}, {"amx_int8"}],
    "w8a8": [{"avx2"}, {"avx_vnni", "avx512_vnni"}, {"avx512_vnni"}, {"amx_int8"}],
    "w8a16": [{"avx2"}, {"avx512bw"}, {"avx512_bf16"}],
    "w16a16": [{"avx2"}, {"avx512bw"}],
    "rounding": [{"avx2"}, {"avx512bw"}],
    "experts": [{"avx2"}, {"avx_vnni", "avx512_vnni"}, {"avx512_vnni"}, {"amx_int8"}],
}
# The folders whose files a kernel is made of, beside its own.
PARTS = {"experts": ("w4a8", "w8a8", "w8a16")}

THREAD_COUNT = """
import os, torch
from ipex_vllm.low_bit.kernels import w4a8, w8a8, w8a16, w16a16
torch.set_num_threads(3)
torch.randn(512, 512) @ torch.randn(512, 512)
torch.randn(1 << 22).exp()
before = len(os.listdir("/proc/self/task"))
packed = w4a8.pack(torch.zeros(1024, 512, dtype=torch.uint8), torch.ones(1024, 16), None)
w4a8.linear(torch.randn(64, 512), packed, None, 1024, 32, True)
packed = w8a8.pack(torch.zeros(1024, 512, dtype=torch.int8), torch.ones(1024, 1))
w8a8.linear(torch.randn(64, 512), packed, None, 1024, w8a8.ROW)
codes = torch.zeros(1024, 512).to(torch.float8_e4m3fn)
w8a16.linear(torch.randn(64, 512), w8a16.pack(codes, torch.ones(1024, 1)), None, 1024, w8a16.ROW, codes.dtype)
w16a16.linear(torch.randn(64, 512), w16a16.pack(torch.zeros(1024, 512).bfloat16()), None, 1024)
print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.parametrize("preload", [None, "libiomp5.so"])
def test_the_kernels_run_on_the_threads_that_torch_has(preload):
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if preload:
        env["LD_PRELOAD"] = str(Path(sys.prefix, "lib", preload))
    done = subprocess.run([sys.executable, "-c", THREAD_COUNT], env=env, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before == after >= 3


@pytest.mark.parametrize("kernel", [w4a8, w8a8, w8a16, w16a16])
def test_without_the_library_the_reason_says_what_to_do(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libkernels.so")
    assert "install a C++ compiler" in kernel.unavailable_reason()


@pytest.mark.parametrize("kernel", [w4a8, w8a8, w8a16, w16a16])
def test_a_library_that_does_not_load_is_a_reason(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libkernels.so")
    native.LIBRARY.write_bytes(b"not a library")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert "do not load, reinstall ipex-vllm from source" in kernel.unavailable_reason()


@pytest.mark.parametrize(
    ("source", "reason"),
    [("int other;", "reinstall ipex-vllm"), ("int register_torch_operators(void) { return -1; }", "need PyTorch 2.8")],
)
def test_a_library_of_another_version_or_an_old_torch_is_a_reason(source, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libkernels.so")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(native.LIBRARY)]
    subprocess.run(command, input=source, text=True, check=True)
    assert reason in w4a8.unavailable_reason()


LEAK = """
import torch
from ipex_vllm.low_bit.kernels import w4a8, w8a8, w8a16, w16a16

def resident_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

def call():
    x, bias = torch.zeros(128, 1 << 14).t(), torch.zeros(64)  # 8 MiB, and not contiguous
    w4a8.linear(x, packed, bias, 64, 128, True)
    w8a8.linear(x, packed_int8, bias, 64, w8a8.ROW)
    w8a16.linear(x, packed_fp8, bias, 64, w8a16.ROW, torch.float8_e4m3fn)
    w16a16.linear(x, packed_bf16, bias, 64)
    try:
        w4a8.linear(x, packed, bias, 65, 128, True)
    except RuntimeError:
        return
    raise AssertionError("a call with the wrong number of outputs went through")

weights = torch.zeros(64, 128)
packed = w4a8.pack(weights.byte(), torch.ones(64, 1), None)
packed_int8 = w8a8.pack(weights.char(), torch.ones(64, 1))
packed_bf16 = w16a16.pack(weights.bfloat16())
packed_fp8 = w8a16.pack(weights.to(torch.float8_e4m3fn), torch.ones(64, 1))
for _ in range(5):
    call()
before = resident_kib()
for _ in range(50):
    call()
print(resident_kib() - before)
"""


def test_operators_keep_no_tensor():
    """Handles of torch's C interface are freed by hand, when a call fails too: one kept a call would be 400 MB here."""
    done = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KiB


def test_without_a_compiler_the_package_still_builds(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    env = os.environ | {"CC": "false", "CXX": "false"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("kernel", [*ISA_FLAGS])
def test_no_access_past_a_buffer_and_no_undefined_behaviour(kernel, tmp_path):
    driver = tmp_path / "driver"
    sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folders = (kernel, "common", *PARTS.get(kernel, ()))
    sources = {source: flags for source, flags in BUILD["SOURCES"].items() if source.parent.name in folders}
    objects = []
    for source, flags in {Path(f"tests/{kernel}_driver.cpp"): [], **sources}.items():
        flags = [*BUILD["FLAGS"], *flags, *sanitize]
        if "-mavxvnni" in flags and "avx_vnni" not in CPU_FLAGS and "avx512_vnni" in CPU_FLAGS:
            flags += ["-mno-avxvnni", *OTHER_ENCODING]
        objects.append(str(tmp_path / f"{source.parent.name}_{source.stem}.o"))
        subprocess.run(["g++", *flags, "-c", str(source), "-o", objects[-1]], cwd=ROOT, check=True)
    subprocess.run(["g++", "-fopenmp", *sanitize, *objects, "-o", str(driver)], check=True)
    # Leaks are not looked for: OpenMP keeps its threads until the process ends.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(driver)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    isas = sum(not flags.isdisjoint(CPU_FLAGS) for flags in ISA_FLAGS[kernel])
    assert f"{isas} instruction sets" in done.stdout
