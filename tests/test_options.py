"""An option is said once in the code and may be said in three ways: as a flag, as a variable, in a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ipex_vllm import worker
from ipex_vllm.engines.vllm_options import add_listed, keep_listing
from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.options import Parser, WorkerOptions, add_options, from_namespace, layered_arguments, option

Layers = dict[str, Any]


@pytest.fixture
def parse(tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """Parse what a file, the environment and the command line say, with the worker's parser or another one."""

    def parse(
        *arguments: str,
        environ: dict[str, str] | None = None,
        file: dict[str, Any] | str | None = None,
        parser: argparse.ArgumentParser | None = None,
    ) -> argparse.Namespace:
        parser = parser or worker.make_parser(None)
        if file is not None:
            path = tmp_path / "options.yaml"
            path.write_text(file if isinstance(file, str) else yaml.safe_dump(file))
            arguments = ("--config", str(path), *arguments)
        return parser.parse_args(layered_arguments(parser, arguments, environ or {}))

    return parse


@pytest.fixture(scope="module")
def engine_parser() -> argparse.ArgumentParser:
    """The worker's parser with every option of vLLM's AsyncEngineArgs."""
    from ipex_vllm.engines.vllm import VllmEngine

    parser = worker.make_parser(None)
    VllmEngine.add_arguments(parser)
    return parser


# One sample for each field: (text of a flag or variable, value in a file, the option's value).
SAMPLES: dict[str, tuple[str, Any, Any]] = {
    "model_path": ("/models/a", "/models/a", "/models/a"),
    "model_names": ("a,b", ["a", "b"], "a,b"),
    "device": ("xpu", "xpu", "xpu"),
    "low_bit": ("sym_int4", "sym_int4", "sym_int4"),
    "low_bit_head": ("none", "none", "none"),
    "low_bit_outer": ("sym_int8", "sym_int8", "sym_int8"),
    "low_bit_cache": ("/cache", "/cache", "/cache"),
    "upstream_kernels": ("yes", True, True),
    "speculative": ("auto", "auto", "auto"),
    "draft_model": ("/models/small", "/models/small", "/models/small"),
    "conv_template": ("zephyr", "zephyr", "zephyr"),
    "host": ("::1", "::1", "::1"),
    "port": ("21003", 21003, 21003),
    "worker_address": ("http://w:1", "http://w:1", "http://w:1"),
    "controller_address": ("http://c:2", "http://c:2", "http://c:2"),
    "no_register": ("true", True, True),
    "limit_worker_concurrency": ("7", 7, 7),
    "limit_worker_queue": ("0", 0, 0),
    "drain_timeout": ("1.5", 1.5, 1.5),
    "client_timeout": ("7.5", 7.5, 7.5),
    "max_stream_gap": ("1.5", 1.5, 1.5),
    "api_token": ("-secret", "-secret", "-secret"),
    "openai": ("no", False, False),
    "log_prompts": ("yes", True, True),
    "cores": ("0,1", [0, 1], "0,1"),
    "kv_cache_gib": ("0.5", 0.5, 0.5),
    "compile": ("off", False, False),
    "preload": ("0", False, False),
    "verbose": ("true", True, True),
    "explain": ("on", True, True),
}


def test_the_samples_cover_every_option_and_differ_from_its_default():
    assert {field.name: field.default for field in dataclasses.fields(WorkerOptions)}.keys() == SAMPLES.keys()
    assert all(field.default != SAMPLES[field.name][2] for field in dataclasses.fields(WorkerOptions))


@pytest.mark.parametrize("name", SAMPLES)
def test_an_option_is_the_same_from_the_environment_the_file_and_the_command_line(parse, name):
    text, in_file, value = SAMPLES[name]
    dashed = name.replace("_", "-")
    if name in ("no_register", "upstream_kernels", "log_prompts", "verbose", "explain"):
        flag = f"--{dashed}"
    else:
        flag = f"--no-{dashed}" if value is False else f"--{dashed}={text}"
    assert getattr(parse(flag), name) == value
    assert getattr(parse(environ={f"IPEX_VLLM_{name.upper()}": text}), name) == value
    assert getattr(parse(file={name: in_file}), name) == value
    assert getattr(parse(file={dashed: in_file}), name) == value


def test_nothing_said_gives_the_defaults(parse):
    assert from_namespace(WorkerOptions, parse()) == WorkerOptions()
    assert from_namespace(WorkerOptions, parse(file="# port: 1\n", environ={"IPEX_VLLM_PORT": ""})) == WorkerOptions()


def test_flag_wins_over_environment_over_file_over_default(parse):
    layers: Layers = {"file": {"port": 2}, "environ": {"IPEX_VLLM_PORT": "3"}}
    assert parse().port == 21002
    assert parse(file=layers["file"]).port == 2
    assert parse(**layers).port == 3
    assert parse("--port", "4", **layers).port == 4


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["preload", "compile", "no_register"])
def test_a_boolean_of_a_weaker_layer_can_be_turned_both_ways(parse, name, value):
    variable = {f"IPEX_VLLM_{name.upper()}": str(value)}
    assert getattr(parse(file={name: not value}, environ=variable), name) is value


@pytest.mark.parametrize(("flag", "value"), [("--compile", True), ("--no-compile", False)])
def test_a_boolean_flag_wins_both_ways(parse, flag, value):
    assert parse(flag, file={"compile": not value}, environ={"IPEX_VLLM_COMPILE": str(not value)}).compile is value


def test_the_file_may_be_named_by_the_environment(parse, tmp_path):
    (tmp_path / "other.yaml").write_text("port: 5\n")
    assert parse(environ={"IPEX_VLLM_CONFIG": str(tmp_path / "other.yaml")}).port == 5
    assert parse(environ={"IPEX_VLLM_CONFIG": str(tmp_path / "other.yaml")}, file={"port": 6}).port == 6


def test_ipex_llms_name_for_low_bit_works_everywhere(parse):
    assert parse("--load-in-low-bit", "sym_int4").low_bit == "sym_int4"
    assert parse("--load_in_low_bit=sym_int4").low_bit == "sym_int4"
    assert parse(file={"load_in_low_bit": "sym_int4"}).low_bit == "sym_int4"
    assert parse(environ={"IPEX_VLLM_LOAD_IN_LOW_BIT": "sym_int4"}).low_bit == "sym_int4"
    layers: Layers = {"file": {"low_bit": "fp16"}, "environ": {"IPEX_VLLM_LOAD_IN_LOW_BIT": "bf16"}}
    assert parse(**layers).low_bit == "bf16"


def test_other_variables_with_the_prefix_are_no_options(parse):
    assert parse(environ={"IPEX_VLLM_SOMETHING_ELSE": "1", "PORT": "1"}).port == 21002


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ({"prot": 1}, "'prot'"),
        ({"config": "again.yaml"}, "'config'"),
        ({"help": True}, "'help'"),
        ({"port": "many"}, "options.yaml: port"),
        ({"device": "tpu"}, "options.yaml: device"),
        ({"compile": "perhaps"}, "compile"),
        ("port: [1", "options.yaml"),
        ("- port\n", "option: value"),
        ("just words", "option: value"),
        ("1: 2", "option: value"),
        ("\0", "options.yaml"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_mistake(parse, file, named):
    with pytest.raises(OptionError) as error:
        parse(file=file)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_one_line(parse, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(OptionError, match=f"^--config {path}: .+$"):
            parse("--config", str(path))


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--nonsense"], {}, "--nonsense"),
        (["--por", "1"], {}, "--por"),  # no abbreviations: vLLM's options would make them ambiguous at any update
        (["--port"], {}, "--port"),
        (["--config"], {}, "--config"),
        ([], {"IPEX_VLLM_PORT": "many"}, "IPEX_VLLM_PORT"),
        ([], {"IPEX_VLLM_NO_REGISTER": "perhaps"}, "IPEX_VLLM_NO_REGISTER"),
    ],
)
def test_a_wrong_flag_or_variable_is_one_line(parse, arguments, environ, named):
    with pytest.raises(OptionError) as error:
        parse(*arguments, environ=environ)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_values_are_taken_as_they_are(parse):
    """A value may look like a flag or hold what argparse, YAML or a shell would treat specially."""
    for value in ("--model-path", "a b", "a=b_c", "100%", "{}"):
        assert parse(environ={"IPEX_VLLM_MODEL_PATH": value}).model_path == value
        assert parse(file={"model_path": value}).model_path == value
        assert parse(f"--model_path={value}").model_path == value


def test_lists_of_single_words():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        port: int = option("a port", 1)

    def parse(arguments: list[str], environ: dict[str, str]) -> list[str]:
        parser = Parser()
        add_options(parser, Options)
        parser.add_argument("--words", nargs="+")
        return parser.parse_args(layered_arguments(parser, arguments, environ)).words

    assert parse([], {"IPEX_VLLM_WORDS": "a b"}) == ["a", "b"]
    assert parse(["--words", "c"], {"IPEX_VLLM_WORDS": "a b"}) == ["c"]
    assert parse(["--port", "2"], {"IPEX_VLLM_WORDS": "a b"}) == ["a", "b"]


def test_the_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        worker.make_parser(None).parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(WorkerOptions):
        assert field.metadata["help"].split(";")[0] in shown
        if field.default not in (None, False):
            assert f"(default: {field.default})" in shown


def test_the_engines_own_options_take_part(parse, engine_parser):
    from vllm.engine.arg_utils import AsyncEngineArgs

    file = {
        "max_num_seqs": 4,
        "max_model_len": "2k",
        "enforce_eager": True,
        "compilation_config": {"mode": 0, "inductor_compile_config": {"a b": [1, "x: y"]}},
        "kv_cache_memory_bytes": "1G",
        "served_model_name": ["a", "b"],
        "gpu-memory-utilization": 0.5,
        "enable_prefix_caching": False,
    }

    def engine_args(*arguments: str, **layers: Any) -> AsyncEngineArgs:
        return AsyncEngineArgs.from_cli_args(parse(*arguments, parser=engine_parser, **layers))

    default, from_file = engine_args(), engine_args(file=file)
    assert (default.enforce_eager, default.kv_cache_memory_bytes) == (False, None)
    assert (from_file.max_num_seqs, from_file.max_model_len, from_file.enforce_eager) == (4, 2000, True)
    assert from_file.compilation_config.mode == 0
    assert from_file.compilation_config.inductor_compile_config["a b"] == [1, "x: y"]
    assert from_file.kv_cache_memory_bytes == 1 << 30
    assert from_file.served_model_name == ["a", "b"]
    assert from_file.gpu_memory_utilization == 0.5
    assert from_file.enable_prefix_caching is False

    environ = {
        "IPEX_VLLM_MAX_NUM_SEQS": "5",
        "IPEX_VLLM_ENFORCE_EAGER": "0",
        "IPEX_VLLM_COMPILATION_CONFIG": json.dumps({"mode": 3}),
        "IPEX_VLLM_KV_CACHE_MEMORY_BYTES": "2048",
        "IPEX_VLLM_SERVED_MODEL_NAME": "c d",
        "IPEX_VLLM_ENABLE_PREFIX_CACHING": "true",
    }
    from_environment = engine_args(file=file, environ=environ)
    assert (from_environment.max_num_seqs, from_environment.enforce_eager) == (5, False)
    assert from_environment.compilation_config.mode == 3
    assert from_environment.kv_cache_memory_bytes == 2048
    assert from_environment.served_model_name == ["c", "d"]
    assert from_environment.enable_prefix_caching is True
    assert from_environment.gpu_memory_utilization == 0.5

    from_flags = engine_args(
        *("--max-num-seqs", "6", "--enforce-eager", "--served-model-name", "e", "--no-enable-prefix-caching"),
        *("--compilation-config", '{"mode": 1}', "--kv-cache-memory-bytes=4096"),
        file=file,
        environ=environ,
    )
    assert (from_flags.max_num_seqs, from_flags.enforce_eager) == (6, True)
    assert from_flags.compilation_config.mode == 1
    assert from_flags.kv_cache_memory_bytes == 4096
    assert from_flags.served_model_name == ["e"]
    assert from_flags.enable_prefix_caching is False


def test_fastchats_spelling_of_vllms_flags(parse, engine_parser):
    arguments = ["--trust_remote_code", "--gpu_memory_utilization", "0.5", "--model-names", "m_1,m_2"]
    args = parse(*arguments, parser=engine_parser)
    assert args.trust_remote_code is True
    assert args.gpu_memory_utilization == 0.5
    assert args.model_names == "m_1,m_2"


def test_a_models_own_code_is_not_trusted_unless_told_to(parse, engine_parser):
    assert parse(parser=engine_parser).trust_remote_code is False
    assert parse("--trust-remote-code", parser=engine_parser).trust_remote_code is True


def test_no_engine_option_hides_a_worker_option(engine_parser):
    flags = [flag for action in engine_parser._actions for flag in action.option_strings]
    assert len(flags) == len(set(flags))
    for field in dataclasses.fields(WorkerOptions):
        assert [action.dest for action in engine_parser._actions].count(field.name) == 1


def test_explain_prints_the_plan_and_no_secret(monkeypatch, caplog, capfd, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "options.yaml").write_text("api_token: file-secret\n")
    monkeypatch.setenv("IPEX_VLLM_API_TOKEN", "variable-secret")
    caplog.set_level("DEBUG")
    arguments = ["--explain", "--no-preload", "--kv-cache-gib=0.1", f"--config={tmp_path / 'options.yaml'}"]
    assert worker.run([*arguments, "--model-path", str(tmp_path), "--api-token", "flag-secret"], None) == 0
    assert "chosen with --kv-cache-gib" in caplog.text
    written = caplog.text + "".join(capfd.readouterr())
    assert "secret" not in written


def test_a_template_that_fastchat_does_not_know_is_told_before_the_model_loads(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--no-preload", "--conv-template", "vicunna", "--model-path", str(tmp_path)]
    with pytest.raises(OptionError, match=r"--conv-template vicunna: FastChat knows .*vicuna_v1.1"):
        worker.run(arguments, None)


def test_a_model_library_that_is_not_installed_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def load():
        import no_such_model_library

        return no_such_model_library.Engine

    with pytest.raises(EngineError, match=r"No module named 'no_such_model_library'; docs/engines.md") as error:
        worker.run(["--no-preload", "--model-path", str(tmp_path)], load)
    assert "\n" not in str(error.value)


def test_vllms_options_are_listed_as_they_are_and_answer_without_vllm(engine_parser, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = worker.make_parser(None)
    own = {action.dest for action in listed._actions}
    assert not add_listed(listed), "nothing is kept yet"
    keep_listing(engine_parser, own)
    assert add_listed(listed)
    assert listed.format_help() == engine_parser.format_help()
    listed_flags, flags = (
        sorted((action.option_strings, action.dest, action.nargs) for action in parser._actions)
        for parser in (listed, engine_parser)
    )
    assert listed_flags == flags
    assert listed.parse_args(["--max-model-len", "2K"]).max_model_len == 2048

    # The worker's answers, in a process of its own: --explain, a wrong flag, a wrong path.
    code = (
        "import sys; from ipex_vllm import worker; from ipex_vllm.errors import OneLine\n"
        "for words in (['--explain'], ['--nonsense'], ['--model-path', '/nope'], ['--kv-cache-gib', 'x']):\n"
        "    try: print(worker.run(['--no-preload', *words], None))\n"
        "    except OneLine as error: print(error)\n"
        "print({'vllm', 'torch', 'transformers'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == [
        "0",
        "unrecognized arguments: --nonsense (see --help)",
        "--model-path /nope does not exist: give the directory of a Hugging Face model",
        "argument --kv-cache-gib: invalid float value: 'x' (see --help)",
        "set()",
    ]


WRONG = [
    ("port", "70000", "expected a whole number from 1 to 65535, not '70000'"),
    ("port", "x", "expected a whole number from 1 to 65535, not 'x'"),
    ("limit_worker_concurrency", "0", "expected a whole number of at least 1, not '0'"),
    ("limit_worker_queue", "-1", "expected a whole number of at least 0, not '-1'"),
    ("drain_timeout", "nan", "expected seconds, 0 or more, not 'nan'"),
    ("model_names", ",", "expected a name, or several with commas between them, not ','"),
    ("model_path", " ", "expected a model directory or a Hugging Face name, and it is empty"),
    *(
        ("controller_address", url, f"expected http://HOST:PORT, an IPv6 address in brackets, not {url!r}")
        for url in (
            *(
                "127.0.0.1:21001",
                "localhost:21001",
                "http://::1:21001",
                "http://[::1:21001",
                "http://",
                "http://a:port",
            ),
            *(
                "http://127.0.0.1:99999",
                "http://127.0.0.1:0",
                "http://a b:21001",
                " http://a:1",
                "http://a:1/?x",
                "ftp://a:1",
            ),
        )
    ),
    ("worker_address", "worker:21002", "expected http://HOST:PORT, an IPv6 address in brackets, not 'worker:21002'"),
    ("host", "a b", "expected an address or a host's name, not 'a b'"),
    ("kv_cache_gib", "much", "invalid float value: 'much'"),
    ("device", "tpu", "invalid choice: 'tpu' (choose from 'cpu', 'xpu')"),
]


@pytest.mark.parametrize(("name", "text", "reason"), WRONG)
def test_a_wrong_value_is_told_when_it_is_read_with_where_it_came_from(parse, name, text, reason):
    flag = name.replace("_", "-")
    for source, said in (
        (f"argument --{flag}", {"arguments": (f"--{flag}={text}",)}),
        (f"IPEX_VLLM_{name.upper()}", {"environ": {f"IPEX_VLLM_{name.upper()}": text}}),
        (f"options.yaml: {name}", {"file": {name: text}}),
    ):
        with pytest.raises(OptionError) as error:
            parse(*said.pop("arguments", ()), **said)
        assert f"{source}: {reason}" in str(error.value)
        assert "\n" not in str(error.value)


def test_an_empty_token_would_guard_nothing(parse):
    with pytest.raises(OptionError, match="argument --api-token: it is empty"):
        parse("--api-token=")


@pytest.mark.parametrize("name", ["controller-address", "worker-address", "host"])
def test_an_empty_address_is_none(parse, name):
    with pytest.raises(OptionError, match=f"argument --{name}: expected .*, not ''"):
        parse(f"--{name}=")


@pytest.mark.parametrize("url", ["http://[::1]:21001", "https://gate.example/fastchat", "http://[fe80::1%eth0]:21001"])
def test_an_address_may_have_brackets_a_path_and_no_port(parse, url):
    assert parse(f"--controller-address={url}").controller_address == url


def test_a_home_directory_is_found_wherever_it_is_said(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(file={"model-path": "~/models/a"}).model_path == "/home/me/models/a"
    assert parse(file="model-path: ~\n").model_path == "demo"  # YAML's word for nothing


def test_a_folder_of_hugging_faces_cache_is_told_with_the_snapshot_to_give(tmp_path):
    snapshot = tmp_path / "models--maker--a-model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(EngineError, match=f"is a folder of Hugging Face's cache: give {snapshot}"):
        worker.check_model_directory(str(snapshot.parents[1]))
    assert WorkerOptions(model_path=str(snapshot)).names == ("a-model",)
    assert WorkerOptions(model_path="/models/a,b").names == ("a,b",)  # as the path has it


def test_a_secret_is_not_in_the_options_repr():
    assert "s3cret" not in repr(WorkerOptions(api_token="s3cret"))
    assert "port=21002" in repr(WorkerOptions())


def test_a_wrong_flag_ends_the_worker_with_one_line_and_status_2():
    command = [sys.executable, "-m", "ipex_vllm.worker", "--nonsense"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stdout == ""
    mistakes = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert mistakes == ["error: unrecognized arguments: --nonsense (see --help)"]
    assert "Traceback" not in process.stderr
    assert "usage:" not in process.stderr
