"""vLLM takes the platform for Ray on a CPU where Ray is installed, and its own elsewhere."""

import sys
from pathlib import Path

import pytest
from vllm.platforms import resolve_current_platform_cls_qualname
from vllm.platforms.cpu import CpuPlatform

from ipex_vllm.engines.ray_platform import RayCpuPlatform


def test_with_ray_vllm_takes_the_platform_whose_ranks_ray_can_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_current_platform_cls_qualname() == "ipex_vllm.engines.ray_platform.RayCpuPlatform"
    assert RayCpuPlatform.ray_device_key == "GPU"
    assert RayCpuPlatform.device_type == CpuPlatform.device_type


def test_without_ray_vllms_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert resolve_current_platform_cls_qualname() == "vllm.platforms.cpu.CpuPlatform"


def test_the_platform_is_still_needed() -> None:
    assert CpuPlatform.ray_device_key == ""
