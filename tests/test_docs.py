"""The commands in README and docs: every program, flag and make target that they name is there, and what was not run
says so.

A block of commands is fenced as `sh`. Commands after a comment "Not run here" are not looked at.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipex_vllm.up import UpOptions, welcome

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\S*python -m|make) [^`]+)`")
NOT_RUN = re.compile(r"^# Not run here.*", re.MULTILINE | re.DOTALL)
ARCHIVED = "ipex_llm."  # the programs from which a user comes


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    for match in FENCED.finditer(document.read_text()):
        yield match[1], match[2]


def commands(document: Path) -> Iterator[list[str]]:
    """Every command as words, from blocks and from the text."""
    lines = []
    for language, block in blocks(document):
        if language == "sh":
            lines += NOT_RUN.sub("", block).replace("\\\n", " ").splitlines()
    lines += [match[1].replace("\\|", "|") for match in INLINE.finditer(FENCED.sub("", document.read_text()))]
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars="&;")
        words.whitespace_split = True
        for is_separator, command in itertools.groupby(words, lambda word: set(word) <= {"&", ";"}):
            if not is_separator:
                yield list(command)


def python_commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Module and arguments of every `python -m`, and of what `make serve` hands on."""
    for document in DOCUMENTS:
        for words in commands(document):
            if words[0].endswith("python") and words[1] == "-m" and not words[2].startswith(ARCHIVED):
                yield words[2], tuple(words[3:])
            for word in words:
                if word.startswith("ARGS="):
                    yield "ipex_vllm.up", tuple(shlex.split(word.removeprefix("ARGS=")))


def make_targets() -> set[str]:
    return {
        word
        for document in DOCUMENTS
        for words in commands(document)
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word
    }


@functools.cache
def help_of(module: str, positionals: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *positionals, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # FastChat sends its standard output through its log, to standard error, and with LOGDIR to a file.
        env={**os.environ, "LOGDIR": "", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_stand_in_blocks_that_are_checked(document: Path) -> None:
    for language, block in blocks(document):
        if not language:
            programs = [line.split()[0] for line in block.splitlines() if line.split()]
            assert not [word for word in programs if shutil.which(word) or word.startswith(".venv")], block


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ours_or_say_that_they_were_not_run(document: Path) -> None:
    for words in commands(document):
        is_known = words[0] in ("make", "curl", "du") or words[0].endswith("python")
        assert is_known, f"run {words} in a test, or write a line `# Not run here: why` above it"


def test_make_targets() -> None:
    targets = make_targets()
    assert {"serve", "test"} <= targets
    subprocess.run(["make", "--dry-run", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)


def test_modules() -> None:
    modules = {module for module, _ in python_commands()}
    assert "ipex_vllm.worker" in modules
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


def test_flags() -> None:
    for module, arguments in sorted(set(python_commands())):
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        if flags:
            shown = set(re.findall(r"--[a-z][\w-]*", help_of(module, arguments[:first_flag])))
            assert flags <= shown, f"python -m {module}: no {sorted(flags - shown)}"


def test_the_curl_of_the_readme_is_the_one_that_is_printed() -> None:
    """tests/e2e/test_service.py runs it."""
    [curl] = [words for words in commands(ROOT / "README.md") if words[0] == "curl"]
    printed = welcome(UpOptions(), [{"model-path": "demo"}]).partition("Try it:\n")[2].partition("Ctrl-C")[0]
    assert curl == shlex.split(printed.replace("\\\n", " ").replace("\\[", "["))
