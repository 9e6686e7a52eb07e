"""The worker's side of FastChat's controller: register, heartbeat, leave. The controller may come and go."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import httpx

logger = logging.getLogger(__name__)

# FastChat's own variable; its controller forgets a worker after 90 s of silence.
HEARTBEAT_INTERVAL_S = float(os.environ.get("FASTCHAT_WORKER_HEART_BEAT_INTERVAL", 45))
RETRY_INTERVAL_S = 5.0
MODELS_INTERVAL_S = 1.0  # between looks at the models' names: adapters come and go
REQUEST_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 20.0  # a refresh polls every worker in turn, 5 s each at most


class ControllerClient:
    """Keeps a worker registered until `leave`.

    Args:
        controller_address: URL of the controller.
        worker_address: URL under which the controller reaches the worker.
        get_status: returns the answer of /worker_get_status.
        heartbeat_interval_s: seconds between heartbeats.
        retry_interval_s: seconds between attempts while the controller does not answer.
        is_multimodal: the model reads pictures, which the web UI asks the controller.
    """

    def __init__(
        self,
        controller_address: str,
        worker_address: str,
        get_status: Callable[[], dict[str, Any]],
        heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S,
        retry_interval_s: float = RETRY_INTERVAL_S,
        is_multimodal: bool = False,
    ) -> None:
        self._is_multimodal = is_multimodal
        self._controller_address = controller_address.rstrip("/")
        self._worker_address = worker_address
        self._get_status = get_status
        self._heartbeat_interval_s = heartbeat_interval_s
        self._retry_interval_s = retry_interval_s
        # Certificates take a twentieth of a second to read, in which nobody is answered: once, and if there are any.
        self._certificates = controller_address.startswith("https:") and httpx.create_ssl_context()
        self._is_reachable = True
        self._registered_models: list[str] = []
        self.is_registered = False

    async def run(self) -> None:
        """Register and send heartbeats for ever; a controller that is away costs a log line and a retry."""
        while True:
            if not self.is_registered:
                self.is_registered = await self._register()
            elif not await self._heartbeat():
                self.is_registered = False
                continue
            await self._wait(self._heartbeat_interval_s if self.is_registered else self._retry_interval_s)

    async def _wait(self, seconds: float) -> None:
        """Wait so long, or until the worker has other models than it registered: heartbeats do not tell them."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, MODELS_INTERVAL_S))
            if self.is_registered and self._get_status()["model_names"] != self._registered_models:
                self.is_registered = False
                return

    async def leave(self) -> None:
        """Make the controller forget this worker at once.

        There is no call for it. A refresh makes the controller poll every worker and drop those that do not answer,
        so the worker must refuse /worker_get_status before it calls this.
        """
        self.is_registered = False
        # Whatever is_registered was: a registration may have been cut off after the controller had it.
        if await self._post("/refresh_all_workers", {}, timeout_s=LEAVE_TIMEOUT_S) is not None:
            logger.info("Left the controller at %s", self._controller_address)

    async def _register(self) -> bool:
        status = self._get_status()
        payload = {
            "worker_name": self._worker_address,
            "check_heart_beat": True,
            "worker_status": status,
            "multimodal": self._is_multimodal,
        }
        # The controller answers 200 whatever comes of it; the heartbeat tells whether it knows the worker.
        if await self._post("/register_worker", payload) is None or not await self._heartbeat():
            return False
        self._registered_models = status["model_names"]
        logger.info("Registered %s with the controller at %s", self._worker_address, self._controller_address)
        return True

    async def _heartbeat(self) -> bool:
        payload = {"worker_name": self._worker_address, "queue_length": self._get_status()["queue_length"]}
        response = await self._post("/receive_heart_beat", payload)
        if response is None:
            return False
        try:
            return bool(response.json()["exist"])
        except (ValueError, KeyError, TypeError):
            logger.warning("Unexpected heartbeat answer from %s: %.200s", self._controller_address, response.text)
            return False

    async def _post(
        self, path: str, payload: dict[str, Any], timeout_s: float = REQUEST_TIMEOUT_S
    ) -> httpx.Response | None:
        try:
            # The controller is on this machine or in this network: a proxy from the environment would only lose it.
            # httpx limits each step, and an answer of single bytes has many: the time is that of the whole.
            client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=self._certificates)
            async with asyncio.timeout(timeout_s), client:
                response = await client.post(self._controller_address + path, json=payload)
                response.raise_for_status()
        except (httpx.HTTPError, TimeoutError) as error:
            if self._is_reachable:
                reason = str(error) or type(error).__name__
                logger.warning("No answer from the controller at %s (%s); will retry", self._controller_address, reason)
            self._is_reachable = False
            return None
        self._is_reachable = True
        return response
