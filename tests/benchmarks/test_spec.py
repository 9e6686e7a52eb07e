from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import tables
from benchmarks.compare.spec import Spec
from benchmarks.compare.systems import SYSTEMS, Absent, launch
from benchmarks.load.generate import LoadOptions, make_work
from benchmarks.load.workload import PromptWriter
from benchmarks.options import BenchmarkError

CONFIGS = sorted((Path(__file__).parents[2] / "benchmarks" / "configs").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "title": "t",
    "model": "m",
    "baseline": "a",
    "systems": {"a": {"system": "command", "format": "bf16"}},
    "load": {"prompt": 32},
    "workloads": {"one": {"arrivals": "closed:1"}, "two": None},
}


def read(tmp_path: Path, **changes: Any) -> Spec:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return Spec.read(path)


def test_workloads_add_to_the_common_load(tmp_path: Path) -> None:
    spec = read(tmp_path, load={"prompt": 32, "timeout": 5})
    assert spec.workloads["one"] == LoadOptions(prompt="32", timeout=5.0, arrivals="closed:1")
    assert spec.workloads["two"] == LoadOptions(prompt="32", timeout=5.0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"colour": 1}, "there is no option 'colour'"),
        ({"systems": {}}, "systems: name at least one"),
        ({"systems": {"a": {"system": "command"}}}, "systems: a: option 'format' is missing"),
        ({"systems": {"a": {"system": "command", "format": "int3"}}}, "systems: a: format must be one of"),
        ({"systems": {"a": 3}}, "systems: a: expected lines of the form"),
        ({"workloads": {"one": {"promt": 3}}}, "workloads: one: there is no option 'promt'"),
        ({"load": {"requests": "many"}}, "workloads: one: requests must be of type int, got 'many'"),
        ({"load": {"ignore_eos": 1}}, "ignore_eos must be of type bool"),
        ({"baseline": "b"}, "baseline 'b' is none of the systems a"),
        ({"at_a_time": -1}, "at_a_time must be at least 0"),
        ({"rounds": 1}, "rounds must be at least 2"),
        ({"rounds": True}, "rounds must be of type int"),
        ({"metrics": ["speed"]}, "metric 'speed' is none of"),
    ],
)
def test_bad_specs_are_one_line(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BenchmarkError, match=complaint) as raised:
        read(tmp_path, **changes)
    assert "\n" not in str(raised.value)


def test_groups_each_hold_the_baseline(tmp_path: Path) -> None:
    systems = dict.fromkeys("abcd", GOOD["systems"]["a"])
    everything = read(tmp_path, systems=systems, resident=True)
    assert everything.groups(["a", "b", "c", "d"]) == [["a", "b", "c", "d"]]
    limited = read(tmp_path, systems=systems, resident=True, at_a_time=2)
    assert limited.groups(["a", "b", "c", "d"]) == [["a", "b", "c"], ["a", "d"]]
    assert limited.groups(["a"]) == [["a"]]


def test_a_missing_key_and_broken_yaml_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in GOOD.items() if key != "title"}))
    with pytest.raises(BenchmarkError, match="option 'title' is missing"):
        Spec.read(path)
    path.write_text("a: [")
    with pytest.raises(BenchmarkError, match=r"spec\.yaml: ") as raised:
        Spec.read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_project_s_own_specs_are_good(path: Path, writer: PromptWriter, tmp_path: Path) -> None:
    spec = Spec.read(path)
    for options in spec.workloads.values():
        make_work(options, writer)
    for name, system in spec.systems.items():
        assert system.system in SYSTEMS
        # Ours, started by a whole command, says whether it waits for the compiler; the older commit always does.
        if system.system == "command" and "ipex_vllm.worker" in system.flags and name != "before":
            assert "--compile" in system.flags or "--no-compile" in system.flags
    tables.accuracy_of("xeon-amx", {"spec": asdict(spec)})  # which raises for a name that is no line's


def test_systems_say_how_they_are_started(model: Path) -> None:
    ours = launch("ipex_vllm_worker", model, 7000, ["--low-bit", "sym_int4"])
    assert (ours.url, ours.protocol, ours.model) == ("http://127.0.0.1:7000", "fastchat", model.name)
    assert "--low-bit" in ours.commands[0].argv
    told = launch("ipex_vllm_worker", model, 7000, ["--no-compile"], "sym_int4")
    assert told.commands[0].argv[-3:] == ["--low-bit", "sym_int4", "--no-compile"]
    chain = launch("fastchat_chain", model, 7000, [])
    assert len(chain.commands) == 3
    assert (chain.url, chain.protocol) == ("http://127.0.0.1:7000", "openai")


def test_an_unknown_system_and_an_absent_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchmarkError, match="system 'x': expected one of"):
        launch("x", model, 7000, [])
    monkeypatch.setenv("LLAMA_SERVER", "/nowhere/llama-server")
    with pytest.raises(Absent, match="make env-llama-cpp"):
        launch("llama_cpp", model, 7000, [])
    with pytest.raises(BenchmarkError, match="system 'command' needs flags"):
        launch("command", model, 7000, ["grpc", "x"])
