"""The systems that can be compared, and how each starts: a row of SYSTEMS, or a function where a row is too little."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load.client import PROTOCOLS
from benchmarks.options import BenchmarkError

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
# AMD's operators, which vLLM takes on AMD's CPUs with AVX-512 as soon as they can be imported: so they lie in no
# environment, and only what is told of their folder finds them.
ZENTORCH = ROOT / ".cache" / "zentorch"


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


@dataclass(frozen=True, kw_only=True)
class Server:
    """A system of one process. `program` is its executable; `{model}`, `{name}`, `{port}` in `argv` are filled in."""

    program: Callable[[], str] = lambda: sys.executable
    argv: Sequence[str]
    protocol: str
    env: Mapping[str, str] = field(default_factory=dict)

    def launch(self, model: Path, port: int, flags: Sequence[str]) -> Launch:
        argv = fill(self.argv, model, port)
        return one_process([self.program(), *argv, *flags], self.protocol, model, port, self.env)


def of_environment(name: str) -> Callable[[], str]:
    """The interpreter of a peer's own environment under the repository; Absent says which make target builds it."""

    def program() -> str:
        python = ROOT / f".venv-{name}" / "bin" / "python"
        if not python.exists():
            raise Absent(f"not installed: run `make env-{name}`")
        return str(python)

    return program


def llama_server() -> str:
    binary = Path(os.environ.get("LLAMA_SERVER") or ROOT / ".cache" / "llama-cpp" / "bin" / "llama-server")
    if not binary.exists():
        raise Absent("not installed: run `make env-llama-cpp`, or set LLAMA_SERVER to another llama-server")
    return str(binary)


def python_with_zentorch() -> str:
    if not ZENTORCH.is_dir():
        raise Absent("not installed: run `make env-zentorch`")
    return sys.executable


def fill(argv: Sequence[str], model: Path, port: int) -> list[str]:
    return [part.format(model=model, name=model.name, port=port) for part in argv]


def one_process(
    argv: Sequence[str], protocol: str, model: Path, port: int, env: Mapping[str, str] | None = None
) -> Launch:
    url = f"http://{HOST}:{port}"
    ready = ("POST", f"{url}/worker_get_status") if protocol == "fastchat" else ("GET", f"{url}/v1/models")
    return Launch([Command(argv, ready, env or {})], url, protocol, model.name)


def any_command(model: Path, port: int, flags: Sequence[str]) -> Launch:
    """Any other server: flags are its protocol and its whole command, with `{model}`, `{name}` and `{port}` in it."""
    if len(flags) < 2 or flags[0] not in PROTOCOLS:
        raise BenchmarkError(f"system 'command' needs flags: {'|'.join(PROTOCOLS)} COMMAND...")
    protocol, *command = flags
    return one_process(fill(command, model, port), protocol, model, port)


def fastchat_chain(model: Path, port: int, flags: Sequence[str]) -> Launch:
    """FastChat's controller and OpenAI API server in front of our worker: what the chain costs beside the worker alone.

    Flags are the worker's. The chain streams no usage, so output tokens are known from the limit that ended the
    request, and it passes no `ignore_eos` on: a request that the model ends early counts as incomplete.
    """
    api, controller, worker = (f"http://{HOST}:{port + offset}" for offset in range(3))

    def listen(module: str, offset: int) -> list[str]:
        return [sys.executable, "-m", module, "--host", HOST, "--port", str(port + offset)]

    addresses = ["--controller-address", controller, "--worker-address", worker]
    worker_options = ["--model-path", str(model), *addresses, COMPILED]
    return Launch(
        [
            Command(listen("fastchat.serve.controller", 1), ("POST", f"{controller}/list_models")),
            Command([*listen("ipex_vllm.worker", 2), *worker_options, *flags], ("POST", f"{worker}/worker_get_status")),
            Command(
                [*listen("ipex_vllm.fastchat_api", 0), "--controller-address", controller],
                ("GET", f"{api}/v1/models"),
            ),
        ],
        api,
        "openai",
        model.name,
    )


LISTEN = ("--host", HOST, "--port", "{port}")
# Registers nowhere.
WORKER = ("--model-path", "{model}", *LISTEN, "--no-register")
# Our worker is compiled before it is measured, and not beside that.
COMPILED = "--compile"
OUR_WORKER = ("-m", "ipex_vllm.worker", *WORKER, COMPILED)
# `python -m` because the `vllm` command of the CPU wheel dies looking for a distribution of that name.
VLLM_SERVE = (
    "-m",
    "vllm.entrypoints.openai.api_server",
    "--model",
    "{model}",
    "--served-model-name",
    "{name}",
    *LISTEN,
)
# vLLM without our plugin, unless the spec's VLLM_PLUGINS names it.
NO_PLUGIN = {"VLLM_PLUGINS": ""}

SYSTEMS: dict[str, Server | Callable[[Path, int, Sequence[str]], Launch]] = {
    "ipex_vllm_worker": Server(argv=OUR_WORKER, protocol="fastchat"),
    # The same worker by its other protocol.
    "ipex_vllm_openai": Server(argv=OUR_WORKER, protocol="openai"),
    "hf_worker": Server(argv=("-m", "workers.hf_worker", *WORKER), protocol="fastchat"),
    "hf_worker_ipex": Server(
        program=of_environment("ipex"), argv=("-m", "workers.hf_worker", "--ipex", *WORKER), protocol="fastchat"
    ),
    "ipex_llm_worker": Server(
        program=of_environment("ipex-llm"),
        argv=("-m", "ipex_vllm.worker", "--engine", "ipex-llm", *WORKER),
        protocol="fastchat",
    ),
    "vllm_serve": Server(argv=VLLM_SERVE, protocol="openai", env=NO_PLUGIN),
    "vllm_serve_zentorch": Server(
        program=python_with_zentorch, argv=VLLM_SERVE, protocol="openai", env={**NO_PLUGIN, "PYTHONPATH": str(ZENTORCH)}
    ),
    # -P: beside the script lies a module named statistics, which would hide Python's.
    "openvino": Server(
        program=of_environment("openvino"),
        argv=("-P", str(Path(__file__).with_name("openvino_server.py")), "--model-path", "{model}", "--port", "{port}"),
        protocol="openai",
    ),
    # Flags must name the GGUF file: `-m FILE`.
    "llama_cpp": Server(program=llama_server, argv=LISTEN, protocol="openai"),
    "fastchat_chain": fastchat_chain,
    "command": any_command,
}
# The option that takes the weights' format. In all others they are as the model has them, or as the spec's flags say.
OURS = ("ipex_vllm_worker", "ipex_vllm_openai", "hf_worker", "hf_worker_ipex", "ipex_llm_worker", "fastchat_chain")
FORMAT_FLAGS = {**dict.fromkeys(OURS, "--low-bit"), "openvino": "--weight-format"}


def launch(system: str, model: Path, port: int, flags: Sequence[str], format: str | None = None) -> Launch:
    """How `system` serves the model directory `model` on `port`, its weights in `format` where it has a flag for that.

    More `flags` for its command line come last, so that they decide. A system of several processes takes the ports that
    follow as well. Raises BenchmarkError for an unknown system and Absent for one that is not installed.
    """
    row = SYSTEMS.get(system)
    if row is None:
        raise BenchmarkError(f"system {system!r}: expected one of {', '.join(sorted(SYSTEMS))}")
    if format and system in FORMAT_FLAGS:
        # The roofline tells OpenVINO's formats from ours by their names.
        flags = [FORMAT_FLAGS[system], format.removeprefix("openvino_"), *flags]
    return row.launch(model, port, flags) if isinstance(row, Server) else row(model, port, flags)
