"""Prometheus metrics of a worker: the core's own counts beside whatever the engine registers (vLLM: `vllm:*`)."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import REGISTRY, Collector

from ipex_vllm.serving.core import Core

PREFIX = "ipex_vllm"


class WorkerCollector(Collector):
    """Reads a core's counts when Prometheus asks, so that serving pays nothing for them."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def collect(self) -> Iterator[Metric]:
        slots, tally = self._core.slots, self._core.tally
        for name, value, help in (
            ("slots", slots.limit, "Requests that may run at once."),
            ("slots_in_use", slots.num_in_use, "Requests running now."),
            ("queue_length", slots.num_waiting, "Requests waiting for a slot."),
            ("ready", int(self._core.is_ready()), "1 when loaded, registered and not draining."),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value)
        for name, value, help in (
            ("disconnects", tally.disconnects, "Requests whose client went away."),
            ("stalled_clients", tally.stalled_clients, "Clients given up: they took or sent nothing for too long."),
            ("frames", tally.frames, "Frames streamed."),
            ("frame_bytes", tally.frame_bytes, "Bytes of frames streamed."),
            ("prompt_tokens", tally.prompt_tokens, "Prompt tokens of requests that produced a token."),
            ("completion_tokens", tally.completion_tokens, "Tokens generated."),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", help, value)
        finished = CounterMetricFamily(f"{PREFIX}_requests", "Requests that ended well.", labels=["finish_reason"])
        for reason, count in tally.finished.items():
            finished.add_metric([reason], count)
        yield finished
        errors = CounterMetricFamily(f"{PREFIX}_errors", "Requests refused or failed.", labels=["error_code"])
        for code, count in tally.errors.items():
            errors.add_metric([str(code)], count)
        yield errors


def exposition(core: Core) -> tuple[bytes, str]:
    """The metrics in Prometheus' text format, and its content type."""
    own = CollectorRegistry()
    own.register(WorkerCollector(core))
    return generate_latest(own) + generate_latest(REGISTRY), CONTENT_TYPE_LATEST
