"""Make one self-contained HTML page of a result directory.

python -m benchmarks.report DIR [DIR ...] --to report.html
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import BenchmarkError
from ipex_vllm.options import Parser

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } pre { overflow-x: auto; background: #f6f6f6; padding: .7rem }
.partial { color: #b00 }
"""


def markdown_to_html(text: str) -> str:
    """The Markdown that `benchmarks.load.output` and `benchmarks.compare` write: headings, tables, lists, text."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if match := re.match(r"(#+) (.*)", lines[0]):
            level = len(match[1])
            parts.append(f"<h{level}>{html.escape(match[2])}</h{level}>")
            lines = lines[1:]
        if lines and lines[0].startswith("|"):
            cells = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            rows = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[2:]]
            head = "".join(f"<th>{cell}</th>" for cell in cells[0])
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
        elif lines:
            parts.append(f"<p>{'<br>'.join(map(html.escape, lines))}</p>")
    return "\n".join(parts)


def section(directory: Path) -> str:
    """One result directory as HTML, its plots inline. Raises BenchmarkError when it holds no result."""
    try:
        result = json.loads((directory / "result.json").read_text())
        summary = (directory / "summary.md").read_text()
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{directory} holds no result of --out ({type(error).__name__}: {error})") from None
    parts = [markdown_to_html(summary)]
    if result["partial"]:
        parts.append('<p class="partial">This run was interrupted: what it has is here.</p>')
    for number, plot in enumerate(sorted(directory.glob("*.svg"))):
        parts.append(f"<figure>{inline_svg(plot.read_text(), f'{directory.name}-{number}-')}</figure>")
    facts = {key: result[key] for key in ("spec", "load", "target", "machine", "peaks") if result.get(key)}
    details = html.escape(json.dumps(facts, indent=1))
    parts.append(f"<details><summary>What was run, and on what</summary><pre>{details}</pre></details>")
    return "\n".join(parts)


def inline_svg(text: str, prefix: str) -> str:
    """The `<svg>` element alone, its ids prefixed: several plots on one page must not share any."""
    element = text[text.index("<svg") :]
    element = re.sub(r'\bid="', f'id="{prefix}', element)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", element)


def page(directories: Sequence[Path]) -> str:
    body = "\n<hr>\n".join(map(section, directories))
    head = f'<meta charset="utf-8"><title>Benchmark results</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="+", help="what --out wrote")
    parser.add_argument("--to", type=Path, help="HTML file to write; default: report.html in the first directory")
    args = parser.parse_args()
    target = args.to or args.directory[0] / "report.html"
    target.write_text(page(args.directory))
    print(target)
    return 0
