"""Any other server: flags are its protocol (`openai` or `fastchat`) and its whole command.

`{model}`, `{name}` (what requests call the model) and `{port}` in it are filled in.
"""

from pathlib import Path

from benchmarks.compare.systems.base import HOST, Command, Launch
from benchmarks.load.client import PROTOCOLS
from benchmarks.options import BenchmarkError


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    if len(flags) < 2 or flags[0] not in PROTOCOLS:
        raise BenchmarkError(f"system 'command' needs flags: {'|'.join(PROTOCOLS)} COMMAND...")
    protocol, *command = flags
    url = f"http://{HOST}:{port}"
    argv = [part.format(model=model, name=model.name, port=port) for part in command]
    ready = ("POST", f"{url}/worker_get_status") if protocol == "fastchat" else ("GET", f"{url}/v1/models")
    return Launch([Command(argv, ready)], url, protocol, model.name)
