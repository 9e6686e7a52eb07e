"""Which running server is put under load, and what is done with the figures."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.load.client import PROTOCOLS, only_model
from benchmarks.load.generate import LoadOptions
from benchmarks.load.measure import Target
from benchmarks.load.resources import listening_pid
from benchmarks.micro.bound import WEIGHTS
from benchmarks.options import add_options
from ipex_vllm.options import Parser, option


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Which server, and what is done with the figures."""

    url: str = option("base URL of the server")
    protocol: str = option(f"how it is spoken to: {' or '.join(PROTOCOLS)}", "fastchat")
    model: str | None = option("name of the model there; default: the only one it serves", None)
    model_path: str = option("the model's local directory: its tokenizer counts the prompts' tokens")
    weights: str | None = option(
        f"measure the machine first and give the share of the roofline for weights in {', '.join(WEIGHTS)}", None
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
