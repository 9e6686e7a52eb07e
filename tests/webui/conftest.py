"""The service with its web UI, started once, and a headless Chromium in front of it.

They end with the last test of this folder: Playwright keeps an event loop running, beside which no other can.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from ipex_vllm.webui import find_environment
from tests.processes import Server, fastchat_controller, worker
from tests.webui.page import ChatPage

expect.set_options(timeout=60_000)  # milliseconds
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no network but this machine
)


@pytest.fixture(scope="package")
def service_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="package")
def controller(service_directory: Path) -> Iterator[Server]:
    with fastchat_controller(service_directory / "controller") as running:
        yield running


@pytest.fixture(scope="package")
def demo_worker(service_directory: Path, controller: Server) -> Iterator[Server]:
    with worker(service_directory / "worker", "--controller-address", controller.url) as running:
        yield running


@pytest.fixture(scope="package")
def webui(service_directory: Path, controller: Server) -> Iterator[Server]:
    if find_environment() is None:
        pytest.fail("the web UI's environment is missing: run `make env-webui`")
    command = ("ipex_vllm.webui", "--controller-url", controller.url)
    with Server(service_directory / "webui", "/", *command) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.fail("Chromium is missing: run `make chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, webui: Server) -> Iterator[OpenPage]:
    """Opens the page in a browser session of its own: `open_page(model="demo")`."""
    opened = OpenPage(browser, webui.url)
    yield opened
    opened.close()


class OpenPage:
    def __init__(self, browser: Browser, url: str) -> None:
        self._context = browser.new_context(viewport={"width": 1100, "height": 1000}, device_scale_factor=1)
        self._context.set_default_timeout(60_000)
        self._url = url

    def __call__(self, **parameters: str) -> ChatPage:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return ChatPage(self._context.new_page(), f"{self._url}/?{query}")

    def close(self) -> None:
        self._context.close()
