"""What Python documents about its own standard library, taken by introspection of the running interpreter.

A fact is about one *entry*: a public module, function, class, exception or method, with its signature and the first
sentence of its docstring. Entries without a usable first sentence are left out, because nothing true could be said.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

PYTHON_VERSION = "3.11.7"

MODULES = """
builtins os os.path sys io re math cmath random statistics itertools functools operator collections collections.abc
string textwrap difflib unicodedata struct codecs datetime zoneinfo calendar time heapq bisect array weakref types copy
pprint reprlib enum graphlib numbers decimal fractions pathlib fileinput stat filecmp tempfile glob fnmatch linecache
shutil pickle copyreg shelve marshal dbm sqlite3 zlib gzip bz2 lzma zipfile tarfile csv configparser tomllib netrc
plistlib hashlib hmac secrets argparse getopt logging logging.config logging.handlers getpass platform errno
ctypes threading multiprocessing multiprocessing.pool multiprocessing.shared_memory concurrent.futures subprocess sched
queue contextvars asyncio socket ssl select selectors signal mmap email email.message email.policy email.utils json
mailbox mimetypes base64 binascii quopri html html.parser html.entities xml.etree.ElementTree xml.dom.minidom xml.sax
webbrowser urllib.request urllib.parse urllib.error urllib.robotparser http http.client http.server http.cookies
http.cookiejar ftplib poplib imaplib smtplib uuid socketserver xmlrpc.client xmlrpc.server ipaddress wave colorsys
gettext locale cmd shlex typing pydoc doctest unittest unittest.mock bdb faulthandler pdb cProfile profile pstats timeit
trace tracemalloc venv zipapp sysconfig warnings dataclasses contextlib abc atexit traceback gc inspect site code codeop
zipimport pkgutil modulefinder runpy importlib importlib.metadata importlib.resources importlib.machinery importlib.util
importlib.abc ast symtable token keyword tokenize tabnanny pyclbr py_compile compileall dis pickletools posix pwd grp
termios tty pty fcntl resource syslog
""".split()

MAX_SENTENCE = 200
MAX_SIGNATURE = 120


@dataclass(frozen=True)
class Entry:
    """One public name of the standard library.

    name: dotted, as a person writes it ("collections.deque.append", "len").
    kind: "module", "function", "class", "exception" or "method".
    module: the module to import ("builtins" for built-ins).
    owner: the class of a method, else None.
    sentence: the first sentence of the docstring, ending with a full stop.
    signature: the arguments in parentheses without self, or None where Python does not tell.
    base: the first base class of a class or exception if it is public, else None.
    """

    name: str
    kind: str
    module: str
    owner: str | None
    sentence: str
    signature: str | None
    base: str | None

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def collect() -> list[Entry]:
    """Every entry of MODULES, in a fixed order; an object that several modules export belongs to the first."""
    seen: set[int] = set()
    entries: list[Entry] = []
    for module_name in MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(module_name)
        entries += _module_entries(module_name, module, seen)
    return entries


def _module_entries(module_name: str, module: ModuleType, seen: set[int]) -> Iterator[Entry]:
    if sentence := first_sentence(module):
        yield Entry(module_name, "module", module_name, None, sentence, None, None)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name in sorted(public_names(module)):
        value = getattr(module, name, None)
        is_class = inspect.isclass(value)
        if id(value) in seen or not (is_class or inspect.isroutine(value)):
            continue
        seen.add(id(value))
        kind = ("exception" if issubclass(value, BaseException) else "class") if is_class else "function"
        if sentence := first_sentence(value):
            base = _base(value) if is_class else None
            yield Entry(prefix + name, kind, module_name, None, sentence, signature(value, name), base)
        if kind == "class":
            yield from _methods(value, prefix + name, module_name)


def _methods(owner: type, owner_name: str, module_name: str) -> Iterator[Entry]:
    for name, raw in sorted(vars(owner).items()):
        value = getattr(owner, name, None)
        if name.startswith("_") or not inspect.isroutine(value):
            continue
        if sentence := first_sentence(value):
            bound = isinstance(raw, staticmethod | classmethod) or type(raw).__name__ == "classmethod_descriptor"
            text = signature(value, name, skip_first=not bound)
            yield Entry(f"{owner_name}.{name}", "method", module_name, owner_name, sentence, text, None)


def public_names(module: ModuleType) -> list[str]:
    """A module's __all__, or else the public names that it defines itself."""
    if (names := getattr(module, "__all__", None)) is not None:
        return [name for name in set(names) if not name.startswith("_")]
    home = {module.__name__, f"_{module.__name__}"}
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (module.__name__ == "builtins" or getattr(value, "__module__", None) in home)
    ]


def first_sentence(value: object) -> str | None:
    """The first sentence of the object's own docstring in plain text, or None if it has none of a usable form."""
    doc = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    if not isinstance(doc, str):
        return None
    paragraphs = [p for p in re.split(r"\n\s*\n", inspect.cleandoc(doc)) if p.strip()]
    candidates = [rest for p in paragraphs[:2] if (rest := _without_signature(p))][:1]
    if paragraphs and (arrow := re.match(r".*\)\s*-+>\s*(\w+ \w[^\n]*)", paragraphs[0])):
        candidates.append(f"Return {arrow.group(1)}")
    return next((sentence for text in candidates if (sentence := _usable_sentence(text))), None)


def _usable_sentence(text: str) -> str | None:
    text = re.sub(r":\w+:`[~!]?([^`]*)`", r"\1", text).replace("``", "").replace("`", "").replace("\\", "")
    text = re.sub(r"(?<!\S)\*(\w+)\*(?!\w)", r"\1", text)
    # A full stop ends the sentence unless it belongs to an abbreviation.
    match = re.match(r"(.+?[.!](?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<! vs\.))(?=\s|$)", text)
    sentence = (match.group(1) if match else text).rstrip(".!") + "."
    usable = (
        sentence.isascii()
        and 12 <= len(sentence) <= MAX_SENTENCE
        and len(sentence.split()) >= 3
        and re.match(r"[A-Z]", sentence)
        and not re.search(r"\bdef |>>>|->|==|::|\|| - |\.\.\.|:\.$|,\.$|[*_]{2}\s|XXX|0x[0-9a-f]{6}", sentence)
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
    )
    return sentence if usable else None


def _without_signature(paragraph: str) -> str:
    """The paragraph on one line, without the signature that C code often documents first; "" if that is all."""
    text = " ".join(paragraph.split())
    match = re.match(r"[\w.]+\([^()]*\)\s*(?:\.\s+|:\s+|--?\s+|-+>[^.:]*?[.:]\s+|(?=[A-Z][a-z]+ ))", text)
    if match:
        rest = text[match.end() :]
        return rest[:1].upper() + rest[1:]
    return "" if re.match(r"[\w.]+ ?\(.*\)\s*(?:-+>|$)", text) else text


def signature(value: object, name: str, skip_first: bool = False) -> str | None:
    """The arguments as "(a, b=1)", from the signature or else the docstring's first line; None if neither tells."""
    try:
        parameters = list(inspect.signature(value).parameters.values())  # type: ignore[arg-type]
    except (ValueError, TypeError):
        match = re.match(rf"\s*(?:\w+\.)?{re.escape(name)}(\([^()]*\))", getattr(value, "__doc__", None) or "")
        text = match.group(1) if match else ""
    else:
        parameters = parameters[1:] if skip_first else parameters
        plain = [
            p.replace(
                annotation=inspect.Parameter.empty, default=p.default if p.default is p.empty else _Default(p.default)
            )
            for p in parameters
        ]
        try:
            text = str(inspect.Signature(plain))
        except ValueError:
            text = ""
        text = text.replace("(/, ", "(").replace("(/)", "()")
    usable = text and text.isascii() and len(text) <= MAX_SIGNATURE and " at 0x" not in text and "\n" not in text
    return " ".join(text.split()) if usable else None


class _Default:
    """A default value whose text does not depend on the machine: objects without a literal form become "..."."""

    def __init__(self, value: object) -> None:
        text = repr(value)
        self.text = "..." if "<" in text or "/" in text or len(text) > 30 else text

    def __repr__(self) -> str:
        return self.text


def _base(cls: type) -> str | None:
    if cls is object:
        return None
    base = cls.__bases__[0]
    if base.__name__.startswith("_"):
        return None
    return base.__name__ if base.__module__ == "builtins" else f"{base.__module__.lstrip('_')}.{base.__qualname__}"
