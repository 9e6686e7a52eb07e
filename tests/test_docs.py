"""The commands in README and docs: each is run by a test or says that it was not, and every program, flag and make
target that is named is there.

A test declares with `@pytest.mark.runs(COMMAND, ...)` what it runs, word for word as it is documented: on other ports
and addresses, with a small model for MODEL, and writing into temporary folders.

A block of commands is fenced as `sh`. In a block, commands after the comment "Not run here" are not looked at; those
after "Run by hand, not by a test" are measurements and builds, of which the names alone are checked. A command in a
sentence or a table names a program.
"""

from __future__ import annotations

import ast
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
NOT_RUN = re.compile(r"^# Not run here[:,] .*", re.MULTILINE | re.DOTALL)
BY_HAND = re.compile(r"^# Run by hand, not by a test: .*", re.MULTILINE | re.DOTALL)
ARCHIVED = "ipex_llm."  # the programs from which a user comes
IS_PYTHON = re.compile(r"(\S*/)?python(3\.\d+)?")


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    for match in FENCED.finditer(document.read_text()):
        yield match[1], match[2]


def split(lines: list[str]) -> Iterator[list[str]]:
    """Every command of these lines as words, without comments."""
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars="&;")
        words.whitespace_split = True
        for is_separator, command in itertools.groupby(words, lambda word: set(word) <= {"&", ";"}):
            if not is_separator:
                yield list(command)


def instructions(document: Path, *excepted: re.Pattern[str]) -> Iterator[list[str]]:
    """Every command in blocks as words, but for the `excepted` parts."""
    for language, block in blocks(document):
        if language == "sh":
            for part in (NOT_RUN, *excepted):
                block = part.sub("", block)
            yield from split(block.replace("\\\n", " ").splitlines())


def commands(document: Path) -> Iterator[list[str]]:
    """Every command as words, from blocks and from the text."""
    yield from instructions(document)
    text = FENCED.sub("", document.read_text())
    yield from split([match[1].replace("\\|", "|") for match in INLINE.finditer(text)])


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


def declared() -> set[str]:
    """What all tests declare to run; read from their text, since some need packages of another environment."""
    found = set()
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for test in ast.walk(ast.parse(file.read_text())):
            if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) and test.name.startswith("test_"):
                for mark in test.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.runs":
                        found |= {shlex.join(shlex.split(ast.literal_eval(command))) for command in mark.args}
    return found


def test_every_command_is_run_by_a_test_or_says_that_it_is_not() -> None:
    documented = {shlex.join(words) for document in DOCUMENTS for words in instructions(document, BY_HAND)}
    unexplained = sorted(documented - declared())
    assert not unexplained, (
        f"{unexplained}: run each in a test and mark that with pytest.mark.runs, or write above it in its block "
        "`# Run by hand, not by a test: why` or `# Not run here: why`"
    )
    assert not declared() - documented, "documented no longer"


@pytest.mark.runs("make serve", "make test")
def test_make_serve_and_make_test_run_what_is_tested() -> None:
    """tests/e2e/service/test_service.py starts the first, and this is run by the second."""
    for target, last in (
        ("serve", ".venv/bin/python -m ipex_vllm.up --model-path 'smollm2' --device cpu"),
        ("test", ".venv/bin/python -m pytest -n 2 --dist loadfile"),
    ):
        # --no-print-directory: under `make test` this is a make in a make, which would end with a line of its own.
        command = ["make", "--dry-run", "--no-print-directory", target]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1].removeprefix("exec ").rstrip() == last


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
    """tests/e2e/test_smollm2.py runs it."""
    [curl] = [words for words in commands(ROOT / "README.md") if words[0] == "curl"]
    printed = welcome(UpOptions(), [{"model-path": "smollm2"}]).partition("Try it:\n")[2].partition("Ctrl-C")[0]
    assert curl == shlex.split(printed.replace("\\\n", " ").replace("\\[", "["))
