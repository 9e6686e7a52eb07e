"""Put load on a running server.

python -m benchmarks.serve --url http://127.0.0.1:21002 --protocol fastchat --model-path DIR --arrivals closed:4
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import plots
from benchmarks.client import PROTOCOLS, only_model
from benchmarks.load import LoadOptions, make_work
from benchmarks.machine import describe_machine
from benchmarks.measure import Target, bound_of, measure
from benchmarks.options import add_options, run_main
from benchmarks.output import markdown_table, print_json_line, print_table, summary_rows, write_json, write_requests
from benchmarks.resources import listening_pid
from benchmarks.roofline import FORMATS, ModelShape, peaks_in_subprocess
from benchmarks.workload import PromptWriter
from ipex_vllm.options import Parser, from_namespace, option


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which server, and what is done with the figures."""

    url: str = option("base URL of the server")
    protocol: str = option(f"how it is spoken to: {' or '.join(PROTOCOLS)}", "fastchat")
    model: str | None = option("name of the model there; default: the only one it serves", None)
    model_path: str = option("the model's local directory: its tokenizer counts the prompts' tokens")
    weights: str | None = option(
        f"measure the machine first and give the share of the roofline for weights in {', '.join(FORMATS)}", None
    )
    out: str | None = option("write JSON, CSV, Markdown and plots into this directory", None)

    def target(self) -> Target:
        """Ask the server for what was left open; its processes are known when it listens on this machine."""
        model = self.model or asyncio.run(only_model(self.url, self.protocol))
        address = urlsplit(self.url)
        local = address.hostname in ("127.0.0.1", "localhost", "::1")
        pid = listening_pid(address.port or 80) if local else None
        return Target(self.url, self.protocol, model, [pid] if pid else [])


def parse(description: str | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parser = parser or Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ServerOptions)
    add_options(parser, LoadOptions)
    return parser.parse_args()


def main() -> int:
    args = parse(__doc__)
    server: ServerOptions = from_namespace(ServerOptions, args)
    options: LoadOptions = from_namespace(LoadOptions, args)
    work = make_work(options, PromptWriter(Path(server.model_path)))
    target = server.target()
    machine = describe_machine()
    bound = None
    if server.weights:
        shape = ModelShape.read(Path(server.model_path))
        bound = bound_of(options, work, peaks_in_subprocess(), shape, server.weights)
    run = asyncio.run(measure(target, work, options, target.model))
    result: dict[str, Any] = {
        "kind": "serve",
        "partial": run.partial,
        "target": {"url": target.url, "protocol": target.protocol, "model": target.model},
        "load": asdict(options),
        "summary": run.summary,
        "bound_output_tps": bound,
        "resources": run.resources,
        "machine": machine,
    }
    title = f"{target.model} at {target.url}: {options.arrivals}" + (" (partial: interrupted)" if run.partial else "")
    rows = summary_rows(run.summary, run.resources, bound)
    if server.out:
        out = Path(server.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "result.json", result)
        write_requests(out / "requests.csv", run.timelines)
        (out / "summary.md").write_text(f"# {title}\n\n" + markdown_table(["figure", "value"], rows))
        plots.latency_distributions(run.timelines, out / "latency")
        plots.request_timeline(run.timelines, out / "timeline")
    print_table(title, ["figure", "value"], rows)
    print_json_line(result)
    return 130 if run.partial else 0


if __name__ == "__main__":
    run_main(main)
