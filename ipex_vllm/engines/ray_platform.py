"""vLLM's CPU platform with the one thing that it lacks for Ray; called by vLLM through `vllm.platform_plugins`.

vLLM's executor places its ranks by the platform's name for a device, and reads which of them Ray gave a rank. vLLM 0.32
leaves that name empty on a CPU, which means "no Ray". Of Ray's names, only accelerators' are counted in that way, so it
is "GPU" here: `ray start --num-gpus N` says how many ranks a host takes.
"""

from __future__ import annotations

import importlib.util

from vllm import platforms
from vllm.platforms.cpu import CpuPlatform


def choose() -> str | None:
    """The platform's name where Ray is installed beside vLLM's CPU build; otherwise vLLM's own choice stays."""
    is_plain_cpu = platforms.cpu_platform_plugin() == "vllm.platforms.cpu.CpuPlatform"
    return f"{__name__}.RayCpuPlatform" if is_plain_cpu and importlib.util.find_spec("ray") else None


class RayCpuPlatform(CpuPlatform):  # type: ignore[misc]
    ray_device_key = "GPU"
