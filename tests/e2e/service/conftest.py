"""One service for all of this folder's tests: the last of them let its parts die."""

from collections.abc import Iterator

import pytest

from tests.processes import Service


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # In float32, so that the order of a batch's sums does not decide between nearly equal logits.
    folder = tmp_path_factory.mktemp("service") / "up"
    environ = {
        "FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1",
        "IPEX_VLLM_ENABLE_AUTO_TOOL_CHOICE": "true",
        "IPEX_VLLM_TOOL_CALL_PARSER": "hermes",
        # Without the white space that the demo model, which knows no JSON, would write without end.
        "IPEX_VLLM_STRUCTURED_OUTPUTS_CONFIG": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }
    with Service(folder, "--low-bit", "fp32", **environ) as running:
        yield running
        assert running.stop() == 0
