"""Several machines, as far as ports of one can stand for them: three workers and two models under one controller."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from benchmarks.make_model import make_model
from tests.processes import Server, eventually, fastchat_api, fastchat_controller, listed_models, worker
from tests.support import openai_client, raw_post

HEARTBEAT = {"FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1", "FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": "5"}  # seconds
LONG = {"prompt": "def", "max_new_tokens": 2000, "ignore_eos": True}


@dataclass(frozen=True)
class Cluster:
    """Two workers of the model "twice" and one of "once"."""

    controller_url: str
    api_url: str
    first: Server
    second: Server
    other: Server

    def address(self, model: str) -> str:
        """The worker to which the controller would send the next request."""
        answer = httpx.post(f"{self.controller_url}/get_worker_address", json={"model": model}, trust_env=False)
        url: str = answer.json()["address"]
        return url

    def addresses(self, model: str, num_requests: int = 4) -> set[str]:
        """Where the next requests would go; the controller counts each of them until the next heartbeat."""
        return {self.address(model) for _ in range(num_requests)}

    def complete(self, model: str) -> str:
        """One completion through FastChat's API server. Raises openai.APIError."""
        with openai_client(self.api_url) as client:
            return client.completions.create(model=model, prompt="def", max_tokens=200).choices[0].text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    tiny = str(make_model("tiny", folder / "tiny"))
    with contextlib.ExitStack() as stack:
        controller = stack.enter_context(fastchat_controller(folder / "controller", **HEARTBEAT))
        first, second, other = (
            stack.enter_context(
                worker(
                    folder / name,
                    *("--model-path", model, "--model-names", served, "--controller-address", controller.url),
                    **HEARTBEAT,
                )
            )
            for name, model, served in (
                ("first", tiny, "twice"),
                ("second", tiny, "twice"),
                ("other", "demo", "once"),
            )
        )
        api = stack.enter_context(fastchat_api(folder / "api", controller.url))
        yield Cluster(controller.url, api.url, first, second, other)


def queue_length(server: Server) -> int:
    length: int = httpx.post(f"{server.url}/worker_get_status", trust_env=False, timeout=30).json()["queue_length"]
    return length


def test_a_request_goes_to_a_worker_of_its_model(cluster: Cluster) -> None:
    assert sorted(listed_models(cluster.controller_url)) == ["once", "twice"]
    assert cluster.addresses("twice") == {cluster.first.url, cluster.second.url}
    assert cluster.addresses("once") == {cluster.other.url}
    for model in ("once", "twice"):
        assert cluster.complete(model)


def test_the_shortest_queue_is_served_next(cluster: Cluster) -> None:
    connections = [raw_post(cluster.first.url, "/worker_generate_stream", LONG) for _ in range(8)]
    eventually(lambda: cluster.addresses("twice") == {cluster.second.url}, "all to the idle one")
    for connection in connections:
        connection.close()
    eventually(lambda: cluster.addresses("twice") == {cluster.first.url, cluster.second.url}, "both are idle again")


def test_a_worker_that_dies_under_load_costs_no_request_that_has_no_token_and_comes_back(cluster: Cluster) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(cluster.complete, "twice") for _ in range(16)]
        eventually(lambda: queue_length(cluster.first) > 1 and queue_length(cluster.second) > 1, "both work")
        cluster.first.kill()
        assert all(answer.result() for answer in answers), "the other one answered"

    # More between two heartbeats, which set the living one's back to zero, than the dead one's last known queue: that
    # alone would keep so many away from it.
    eventually(lambda: cluster.addresses("twice", 300) == {cluster.second.url}, "the dead one is forgotten")
    assert all(cluster.complete("twice") for _ in range(4))

    cluster.first.start()
    eventually(lambda: cluster.addresses("twice") == {cluster.first.url, cluster.second.url}, "it is back")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(cluster.complete, ["twice"] * 4))
