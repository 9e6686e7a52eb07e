"""Several machines, as far as ports of one can stand for them: three workers and two models under one controller.

Two of them serve the same random weights, and have one OpenAI address too, by nginx.
"""

import contextlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from benchmarks.make_model import make_model
from tests.json_schemas import is_trivial, random_schema
from tests.processes import Server, eventually, fastchat_api, fastchat_controller, listed_models, worker
from tests.support import openai_client, raw_post
from tests.test_deploy import running_nginx

HEARTBEAT = {"FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1", "FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": "5"}  # seconds
# Without the white space that random weights would write without end.
STRUCTURED = '{"backend": "xgrammar", "disable_any_whitespace": true}'
LONG = {"prompt": "def", "max_new_tokens": 2000, "ignore_eos": True}


@dataclass(frozen=True)
class Cluster:
    """Two workers of the model "twice" and one of "once"."""

    controller_url: str
    api_url: str
    first: Server
    second: Server
    other: Server
    nginx_url: str

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
                    *("--structured-outputs-config", STRUCTURED),
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
        addresses = {"127.0.0.1:21002": first.url, "127.0.0.1:21003": second.url}
        replaced = {address: url.partition("//")[2] for address, url in addresses.items()}
        nginx = stack.enter_context(running_nginx(folder, "nginx-workers.conf", "/v1/models", **replaced))
        yield Cluster(controller.url, api.url, first, second, other, nginx)


def queue_length(server: Server) -> int:
    length: int = httpx.post(f"{server.url}/worker_get_status", trust_env=False, timeout=30).json()["queue_length"]
    return length


def num_finished(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("ipex_vllm_requests_total"))


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


def test_nginx_streams_from_both(cluster: Cluster) -> None:
    before = [num_finished(server) for server in (cluster.first, cluster.second)]
    with openai_client(cluster.nginx_url) as client, ThreadPoolExecutor(8) as pool:
        asked: Any = {"model": "twice", "messages": [{"role": "user", "content": "Go on"}], "max_tokens": 50}
        asked |= {"temperature": 0, "extra_body": {"ignore_eos": True}}

        def stream(_: int) -> tuple[int, str, Any]:
            *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            return len(chunks), "".join(chunk.choices[0].delta.content or "" for chunk in chunks), last.usage

        whole = client.chat.completions.create(**asked)
        for num_chunks, text, usage in pool.map(stream, range(8)):
            assert num_chunks > 10, "the answer came in one piece"
            assert (text, usage) == (whole.choices[0].message.content, whole.usage)
    answered = [num_finished(server) - old for server, old in zip((cluster.first, cluster.second), before, strict=True)]
    assert min(answered) >= 2, answered


def test_no_answer_that_ended_violates_its_schema(cluster: Cluster) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(200)]

    def ask(client: openai.OpenAI, seed: int) -> tuple[str | None, str | None]:
        answer = client.chat.completions.create(
            model="twice",
            messages=[{"role": "user", "content": "Go on"}],
            seed=seed,
            max_tokens=400,
            response_format={"type": "json_schema", "json_schema": {"name": "schema", "schema": schemas[seed]}},
        )
        return answer.choices[0].finish_reason, answer.choices[0].message.content

    with openai_client(cluster.nginx_url) as client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda seed: ask(client, seed), range(len(schemas))))
    values = []
    for schema, (finish_reason, text) in zip(schemas, answers, strict=True):
        if finish_reason == "stop":
            values.append(json.loads(text or ""))
            jsonschema.validate(values[-1], schema)
    assert sum(not is_trivial(value) for value in values) >= len(schemas) // 2, len(values)


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
    with openai_client(cluster.nginx_url) as client:  # which asks the living one, too
        assert all(client.completions.create(model="twice", prompt="def", max_tokens=2).choices for _ in range(4))

    cluster.first.start()
    eventually(lambda: cluster.addresses("twice") == {cluster.first.url, cluster.second.url}, "it is back")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(cluster.complete, ["twice"] * 4))
