"""The options of a worker, each written down once: a dataclass field with its help.

The command line, the environment (`IPEX_VLLM_PORT`) and the configuration file (`port: 21002`) are three ways to say
the same flags, so they are turned into one argument list, weakest first, and argparse reads that. An engine's own
options take part as well. It is longer than other files because a worker's options stand here, all of them and nowhere
else, beside how they are read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import yaml

from ipex_vllm.errors import OptionError
from ipex_vllm.ports import http_url

ENVIRONMENT_PREFIX = "IPEX_VLLM_"
CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
HOST = re.compile(r"[\w.:%-]+")  # a name or an address; one of IPv6 may end with %interface
TRUE_WORDS, FALSE_WORDS = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}

Device = Literal["cpu", "xpu"]
Speculative = Literal["off", "auto", "ngram", "draft"]


def option(
    help: str,
    default: Any = MISSING,
    *,
    aliases: Sequence[str] = (),
    secret: bool = False,
    parse: Callable[[str], Any] | None = None,
    alone: Any = MISSING,
) -> Any:
    """A dataclass field that is a flag. A secret one is left out of the dataclass' repr.

    `alone` is the value of the flag without one, where that is possible. `parse` makes the value of a text, or raises
    argparse.ArgumentTypeError; by default the field's type does.
    """
    return field(
        default=default,
        repr=not secret,
        metadata={"help": help, "aliases": tuple(aliases), "parse": parse, "alone": alone},
    )


def same_option(cls: Any, name: str) -> Any:
    """The flag `name` of the options dataclass `cls`, in another one: default, help and aliases are written once."""
    (entry,) = (entry for entry in fields(cls) if entry.name == name)
    return field(default=entry.default, repr=entry.repr, metadata=entry.metadata)


def whole_number(lowest: int, highest: float = math.inf) -> Callable[[str], int]:
    """What parses a whole number in these bounds."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not lowest <= number <= highest:
            bounds = f"from {lowest} to {highest}" if highest < math.inf else f"of at least {lowest}"
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, not {text!r}")
        return number

    return parse


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, not {text!r}")
    return number


def names(text: str) -> str:
    if not split_names(text):
        raise argparse.ArgumentTypeError(f"expected a name, or several with commas between them, not {text!r}")
    return text


def split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def path_or_name(text: str) -> str:
    """A model's path, its `~` made a home directory (a shell does that, a file and a variable do not), or its name."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a model directory or a Hugging Face name, and it is empty")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def http_address(text: str) -> str:
    """A URL that an HTTP server can have."""
    try:
        parts = urlsplit(text)
        has_host = bool(HOST.fullmatch(parts.hostname or "")) and not re.search(r"\s", text)
        is_one = has_host and parts.scheme in ("http", "https") and parts.port != 0 and not parts.query + parts.fragment
    except ValueError:  # of the port, as in http://::1:21001, or of brackets
        is_one = False
    if not is_one:
        raise argparse.ArgumentTypeError(f"expected http://HOST:PORT, an IPv6 address in brackets, not {text!r}")
    return text


def host_name(text: str) -> str:
    """What to listen on; nothing would be every address of the machine."""
    if not HOST.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected an address or a host's name, not {text!r}")
    return text


port_number = whole_number(1, 65535)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where a worker listens, what it serves and how much it takes on."""

    model_path: str = option(
        'model directory, GGUF file or Hugging Face name; "demo" and "smollm2" come along', "demo", parse=path_or_name
    )
    model_names: str | None = option(
        "names shown to clients, comma separated; default: the model path's last part", None, parse=names
    )
    device: Device = option("what computes", "cpu")
    low_bit: str | None = option(
        "weight format on load: bf16, fp16, fp32 or one of ipex-llm's low-bit formats (sym_int4, sym_int8, ...)",
        None,
        aliases=["--load-in-low-bit"],
    )
    low_bit_head: str | None = option(
        'format of the output head beside --low-bit: a name, "same" or "none"; default: 8-bit integers', None
    )
    low_bit_outer: str | None = option(
        "format of the first and the last decoder layer beside --low-bit; default: that of the others", None
    )
    low_bit_cache: str | None = option(
        "keep what --low-bit makes of the weights in this folder, which the next start reads; without a folder, beside "
        "the user's other caches; it takes as much disk as the weights do memory",
        None,
        alone="",
    )
    upstream_kernels: bool = option(
        "leave what is quantized already (AWQ, GPTQ, ...), and what stays in 16 bits, to vLLM's own kernels",
        False,
    )
    speculative: Speculative = option(
        "speculative decoding: several tokens a step, drafted by looking them up in the text so far (ngram) or by a "
        "smaller model (draft); auto: by that model where --draft-model names one, else ngram where the model can",
        "off",
    )
    draft_model: str | None = option(
        "model that drafts, with the same tokenizer; a path or name as for --model-path", None, parse=path_or_name
    )
    conv_template: str | None = option("FastChat conversation template; default: the model's own chat template", None)
    host: str = option(
        "address to listen on; anything but loopback opens the worker to the network", "127.0.0.1", parse=host_name
    )
    port: int = option("port to listen on", 21002, parse=port_number)
    worker_address: str | None = option("URL under which the controller reaches this worker", None, parse=http_address)
    controller_address: str = option("URL of FastChat's controller", "http://127.0.0.1:21001", parse=http_address)
    no_register: bool = option("do not register with a controller", False)
    limit_worker_concurrency: int = option("requests served at once", 1024, parse=whole_number(1))
    limit_worker_queue: int = option(
        "requests that may wait beyond those; more are refused", 256, parse=whole_number(0)
    )
    drain_timeout: float = option("seconds that running requests get to finish on SIGTERM", 30.0, parse=seconds)
    client_timeout: float = option(
        "seconds until a client is given up that takes nothing of its answer or sends nothing of its request; 0: never",
        60.0,
        parse=seconds,
    )
    api_token: str | None = option(
        "ask every client for `Authorization: Bearer TOKEN`", None, secret=True, parse=not_empty
    )
    openai: bool = option("serve OpenAI's API, too, under /v1, where the engine can", True)
    log_prompts: bool = option("write prompts into the log", False)
    cores: str | None = option('cores that compute, e.g. "0-7"; default: all physical cores of one NUMA node', None)
    kv_cache_gib: float | None = option("GiB for the KV cache; default: sized from the memory that is free", None)
    max_stream_gap: float = option(
        "seconds that a running stream may wait for the prompts of others, which are cut to fit; 0: as vLLM does",
        0.5,
        parse=seconds,
    )
    compile: bool | None = option(
        "torch.compile the model before it serves; default: by its size, beside the service", None
    )
    preload: bool = option("preload Intel's OpenMP and tcmalloc when they are installed", True)
    verbose: bool = option("show what the model library logs, too", False)
    explain: bool = option("print what would be chosen for this machine, and why, and exit", False)

    @property
    def names(self) -> tuple[str, ...]:
        return split_names(self.model_names) if self.model_names else (model_name(self.model_path),)

    @property
    def address(self) -> str:
        return self.worker_address or http_url(self.host, self.port)


def model_name(model_path: str) -> str:
    """The name of a model for its clients: its path's last part, or its repository's in Hugging Face's cache."""
    path = Path(model_path)
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    return path.name.removesuffix(".gguf")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the hundreds of options that the usage would list."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see --help)")


def add_options(parser: argparse._ActionsContainer, cls: type) -> None:
    """Add one flag for each field of the options dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        kinds = [kind for kind in _alternatives(hints[entry.name]) if kind is not types.NoneType]
        flags = [_flag(entry.name), *entry.metadata["aliases"]]
        shows_default = entry.default not in (None, False, MISSING)
        help_text = entry.metadata["help"] + (f" (default: {entry.default})" if shows_default else "")
        keywords: dict[str, Any] = {"dest": entry.name, "default": entry.default, "help": help_text}
        if kinds == [bool]:
            keywords["action"] = argparse.BooleanOptionalAction if entry.default is not False else "store_true"
        elif typing.get_origin(kinds[0]) is Literal:
            keywords["choices"] = typing.get_args(kinds[0])
        else:
            keywords.update(type=entry.metadata["parse"] or kinds[0], metavar=entry.name.rsplit("_", 1)[-1].upper())
            if entry.metadata["alone"] is not MISSING:
                keywords.update(nargs="?", const=entry.metadata["alone"])
        parser.add_argument(*flags, **keywords)


def from_namespace(cls: type[Any], namespace: argparse.Namespace) -> Any:
    """Build the options dataclass `cls` from what its parser returned."""
    return cls(**{entry.name: getattr(namespace, entry.name) for entry in fields(cls)})


def layered_arguments(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    ignore_unknown: bool = False,
) -> list[str]:
    """Put the configuration file's and the environment's options before `arguments`, so that the last word wins.

    Raises OptionError for a file that cannot be read, a value that is no yes or no where one is needed and, unless
    told to ignore it, for a key of the file that is no option. Other variables with our prefix may exist.
    """
    arguments = [_with_dashes(argument) for argument in arguments]
    path = config_path(arguments, environ)
    actions = _actions_by_name(parser)
    layered: dict[str, list[str]] = {}  # by destination: a later layer replaces what an earlier one said
    if path:
        for key, value in read_config(path).items():
            action = actions.get(key.replace("-", "_"))
            if action is not None:
                layered[action.dest] = _checked(parser, action, value, f"{path}: {key}")
            elif not ignore_unknown:
                raise OptionError(f"{path}: there is no option {key!r} (see --help)")
    for variable, text in environ.items():
        action = actions.get(variable.removeprefix(ENVIRONMENT_PREFIX).lower())
        if variable.startswith(ENVIRONMENT_PREFIX) and action is not None and text:  # empty is as good as unset
            layered[action.dest] = _checked(parser, action, text, variable)
    return [*itertools.chain.from_iterable(layered.values()), *arguments]


def check_flags(flags: Mapping[str, Any], cls: type, source: str) -> None:
    """Raise OptionError, naming `source`, for a wrong value among flags that options dataclass `cls` knows."""
    parser = Parser(add_help=False)
    add_options(parser, cls)
    actions = _actions_by_name(parser)
    for name, value in flags.items():
        if action := actions.get(name.replace("-", "_")):
            _checked(parser, action, value, f"{source}: {name}")


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, source: str) -> list[str]:
    """`_as_arguments`, tried by itself, so that a wrong value is told with the place that it came from."""
    arguments = _as_arguments(action, value, source)
    if action.nargs != 0 and arguments:
        try:
            # A word of one option with its value; the others' own requirements play no part.
            parser._get_values(action, [arguments[0].partition("=")[2]] if action.nargs is None else arguments[1:])
        except argparse.ArgumentError as error:
            raise OptionError(f"{source}: {error.message}") from error
    return arguments


def config_path(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> str | None:
    """The configuration file that `arguments` name or, failing them, the environment."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path: str | None = parser.parse_known_args(arguments)[0].config or environ.get(CONFIG_VARIABLE)
    return path


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML file of `option: value` lines. Raises OptionError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {path}: {' '.join(str(error).split())}") from error
    if content is None:  # nothing but comments
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise OptionError(f"--config {path}: expected lines of the form `option: value`")
    return content


def _actions_by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options that a file or the environment may set, by each of their names."""
    return {
        flag.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and not _is_negative(action, flag) and action.dest not in ("help", "config")
    }


def _is_negative(action: argparse.Action, flag: str) -> bool:
    return isinstance(action, argparse.BooleanOptionalAction) and flag.startswith("--no-")


def _as_arguments(action: argparse.Action, value: Any, source: str) -> list[str]:
    """Say `value` as a command line would. `source` is where it comes from, for the error."""
    if value is None:
        return []
    flags = [flag for flag in action.option_strings if flag.startswith("--")]
    if action.nargs == 0:
        is_on = _as_bool(value, source)
        return [flag for flag in flags if _is_negative(action, flag) != is_on][:1]
    if action.nargs == "?" and str(value).strip().lower() in TRUE_WORDS | FALSE_WORDS:
        return flags[:1] if _as_bool(value, source) else []
    if action.nargs in ("+", "*"):
        return [flags[0], *(map(str, value) if isinstance(value, list) else str(value).split())]
    # One word, so that a value that starts with a dash is not read as a flag.
    return [f"{flags[0]}={as_word(value)}"]


def as_word(value: Any) -> str:
    """A value of a file as a command line would say it: lists with commas, what is deeper as JSON."""
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)


def _as_bool(value: Any, source: str) -> bool:
    word = str(value).strip().lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise OptionError(f"{source}: expected true or false, not {value!r}")
    return word in TRUE_WORDS


def _with_dashes(argument: str) -> str:
    """FastChat and vLLM spell some flags with underscores."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
