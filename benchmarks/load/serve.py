"""Put load on a running server.

python -m benchmarks.serve --url http://127.0.0.1:21002 --protocol fastchat --model-path DIR --arrivals closed:4
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.load import plots
from benchmarks.load.generate import LoadOptions, make_work
from benchmarks.load.measure import bound_of, measure
from benchmarks.load.output import (
    markdown_table,
    print_json_line,
    print_table,
    summary_rows,
    write_json,
    write_requests,
)
from benchmarks.load.server import ServerOptions, parse
from benchmarks.load.workload import PromptWriter
from benchmarks.machine import describe_machine
from benchmarks.micro.bound import ModelShape, peaks_in_subprocess
from ipex_vllm.options import from_namespace


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
