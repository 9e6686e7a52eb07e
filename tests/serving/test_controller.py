"""Registration with FastChat's own controller, unmodified, in a real process that comes and goes."""

import asyncio
import contextlib
import logging
import ssl
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ipex_vllm.serving.controller import ControllerClient
from tests.support import FakeEngine, free_port, make_server, serving


class ControllerProcess:
    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: Process | None = None

    async def start(self) -> None:
        command = [sys.executable, "-m", "fastchat.serve.controller", "--port", str(self.port)]
        self._process = await asyncio.create_subprocess_exec(*command, cwd=self._folder, stdout=DEVNULL, stderr=DEVNULL)
        await eventually(lambda: self.models() is not None)

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    def models(self) -> list[str] | None:
        try:
            models: list[str] = httpx.post(self.url + "/list_models", trust_env=False).json()["models"]
        except httpx.HTTPError:
            return None
        return models


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.1)


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[ControllerProcess]:
    process = ControllerProcess(tmp_path)
    yield process
    await process.kill()


@contextlib.asynccontextmanager
async def running(client: ControllerClient) -> AsyncIterator[None]:
    task = asyncio.create_task(client.run())
    try:
        yield
    finally:
        task.cancel()


async def test_the_controller_may_come_late_and_go_and_return(
    controller: ControllerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(FakeEngine())
    with serving(server) as url, caplog.at_level(logging.INFO):
        client = ControllerClient(controller.url, url, server.status, heartbeat_interval_s=0.2, retry_interval_s=0.2)
        async with running(client):
            await asyncio.sleep(1)
            assert not client.is_registered
            await controller.start()
            await eventually(lambda: controller.models() == ["fake-model"] and client.is_registered)

            await controller.kill()
            await eventually(lambda: not client.is_registered)
            await controller.start()  # it has forgotten everybody
            await eventually(lambda: controller.models() == ["fake-model"])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, "one line for each absence, not one for each attempt"
    assert controller.url in warnings[0]


async def test_a_worker_leaves_at_once(controller: ControllerProcess) -> None:
    await controller.start()
    leaving, staying = make_server(FakeEngine()), make_server(FakeEngine())
    staying.core._names = ("other-model",)
    with serving(leaving) as url, serving(staying) as other_url:
        client = ControllerClient(controller.url, url, leaving.status)
        async with running(ControllerClient(controller.url, other_url, staying.status)):
            async with running(client):
                await eventually(lambda: sorted(controller.models() or []) == ["fake-model", "other-model"])
            leaving.core.slots.is_closed = True
            await client.leave()
            assert controller.models() == ["other-model"]
            assert not client.is_registered


async def test_no_heartbeat_reads_certificates(controller: ControllerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    load = ssl.SSLContext.load_verify_locations

    def counted(context: ssl.SSLContext, *arguments: Any, **options: Any) -> None:
        read.append(context)
        load(context, *arguments, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", counted)
    await controller.start()
    read.clear()  # the look whether it is up reads them
    with serving(make_server(FakeEngine())) as url:
        client = ControllerClient(controller.url, url, lambda: {"model_names": ["m"], "speed": 1, "queue_length": 0})
        assert await client._register()
    assert read == []
    secure = ControllerClient("https://controller.example", "http://127.0.0.1:1", dict)
    assert len(read) == 1
    assert isinstance(secure._certificates, ssl.SSLContext)
    assert secure._certificates.verify_mode is ssl.CERT_REQUIRED
