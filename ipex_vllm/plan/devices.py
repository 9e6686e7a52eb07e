"""The devices, each a module with the same functions. Here alone a device is chosen by its name."""

from __future__ import annotations

from typing import Any, Protocol

from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import Device, WorkerOptions
from ipex_vllm.plan import cpu, xpu
from ipex_vllm.plan.plan import Demands, Plan


class Planner(Protocol):
    """What a device's module does, in the order in which a worker calls it."""

    def apply(self, machine: MachineFacts) -> None:
        """Give the process the libraries that it computes with, which may restart it; before anything heavy."""

    def probe(self, machine: MachineFacts) -> Any:
        """What the device is."""

    def choose(self, found: Any, options: WorkerOptions, model: ModelFacts, demands: Demands) -> Plan:
        """Choose the settings. Raises OptionError, and EngineError for what does not fit the device."""


PLANNERS: dict[Device, Planner] = {"cpu": cpu, "xpu": xpu}
