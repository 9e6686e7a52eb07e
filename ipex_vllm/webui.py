"""FastChat's web UI against our controller: `python -m ipex_vllm.webui --controller-url http://127.0.0.1:21001`.

FastChat's Gradio web server cannot share an environment with vLLM, so it has its own (`make env-webui`). This program
finds that environment, looks whether the service is there, and turns into the web server: see webui_server.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx

from ipex_vllm.errors import OptionError, run_main
from ipex_vllm.options import (
    Parser,
    add_options,
    from_namespace,
    host_name,
    http_address,
    layered_arguments,
    option,
    port_number,
)
from ipex_vllm.ports import check_port

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("webui_server.py")
CONTROLLER_TIMEOUT_S = 10.0

ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    # It calls the controller, the workers and itself: a proxy would only lose them.
    "NO_PROXY": "*",
    "no_proxy": "*",
}


@dataclass(frozen=True, kw_only=True)
class WebOptions:
    """Where the web UI listens and whose models it shows."""

    controller_url: str = option(
        "URL of FastChat's controller", "http://127.0.0.1:21001", aliases=["--controller-address"], parse=http_address
    )
    host: str = option(
        "address to listen on; anything but loopback opens the page to the network", "127.0.0.1", parse=host_name
    )
    port: int = option("port to listen on", 7860, parse=port_number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Turn this process into the web server."""
    run_main(lambda: become(prepare(sys.argv[1:] if arguments is None else arguments)))


def become(command: list[str]) -> NoReturn:
    os.execve(command[0], command, {**os.environ, **ENVIRONMENT})


def prepare(arguments: Sequence[str]) -> list[str]:
    """Return the web server's command line. Raises OptionError when it could not run."""
    parser = Parser(
        prog="python -m ipex_vllm.webui",
        allow_abbrev=False,
        epilog="Other options are FastChat's: --gradio-auth-path FILE, --gradio-root-path PATH, ...",
    )
    add_options(parser, WebOptions)
    namespace, others = parser.parse_known_args(layered_arguments(parser, arguments))
    options: WebOptions = from_namespace(WebOptions, namespace)
    python = find_environment()
    if python is None:
        raise OptionError(
            "the web UI has an environment of its own, and it is not there: `make env-webui` builds it "
            "(IPEX_VLLM_WEBUI_ENV names one elsewhere)"
        )
    controller_url = options.controller_url.rstrip("/")
    check_controller(controller_url)
    check_port(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host  # Gradio makes a URL of it
    return [
        *(str(python), "-I", "-u", "-W", "ignore", str(SERVER)),
        *("--controller-url", controller_url, "--host", host, "--port", str(options.port)),
        *("--model-list-mode", "reload"),  # workers come and go: ask the controller at every page load
        *others,
    ]


def find_environment() -> Path | None:
    """Return the Python of the web UI's environment, or None when that was not built."""
    python = Path(os.environ.get("IPEX_VLLM_WEBUI_ENV") or ROOT / ".venv-webui") / "bin/python"
    return python if python.exists() else None


def check_controller(url: str) -> None:
    try:
        httpx.post(f"{url}/list_models", timeout=CONTROLLER_TIMEOUT_S, trust_env=False).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OptionError(
            f"no controller answers at {url} ({error}): start one with `python -m fastchat.serve.controller`, "
            "or name another with --controller-url"
        ) from error


if __name__ == "__main__":
    main()
