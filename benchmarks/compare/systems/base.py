"""What every system says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.options import BenchmarkError

ROOT = Path(__file__).parents[3]
HOST = "127.0.0.1"


class Absent(BenchmarkError):
    """The system is not installed here; the text says how to install it."""


@dataclass(frozen=True)
class Command:
    """One process. The next one is started when `ready` (method, URL) answers with status 200."""

    argv: Sequence[str]
    ready: tuple[str, str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """The processes of a system in the order in which they start, and how to talk to it once they run."""

    commands: Sequence[Command]
    url: str
    protocol: str
    model: str


def python_of(environment: str, target: str) -> str:
    """The interpreter of a peer's own environment under the repository; Absent says which make target builds it."""
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        raise Absent(f"not installed: run `make {target}`")
    return str(python)


def fastchat_worker(argv: Sequence[str], model: Path, port: int, env: Mapping[str, str] | None = None) -> Launch:
    """A single FastChat worker that registers nowhere; `argv` is its command without the options named here."""
    url = f"http://{HOST}:{port}"
    options = ["--model-path", str(model), "--host", HOST, "--port", str(port), "--no-register"]
    command = Command([*argv, *options], ("POST", f"{url}/worker_get_status"), env or {})
    return Launch([command], url, "fastchat", model.name)


def openai_server(argv: Sequence[str], model_name: str, port: int, env: Mapping[str, str] | None = None) -> Launch:
    """A single OpenAI-like server; `argv` is its whole command."""
    url = f"http://{HOST}:{port}"
    return Launch([Command(argv, ("GET", f"{url}/v1/models"), env or {})], url, "openai", model_name)
