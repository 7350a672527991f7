"""One self-contained page per run directory: what was asked, found and drawn."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.results import write

STYLE = """
body { font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
pre { overflow-x: auto; line-height: 1.25; background: #f6f6f6; padding: 1em; }
img { max-width: 100%; }
"""
NAME = "report.html"
# Characters in a line of the table.
WIDTH = 130


def write_page(
    directory: Path,
    about: dict[str, Any],
    question: str,
    table: Table,
    verdict: Sequence[str],
    figures: Sequence[Path],
) -> Path:
    """Writes the page.

    Args:
      directory: the run directory.
      about: what `config.json` holds.
      question: what the experiment is, in a line.
      table: its results.
      verdict: what they say, a sentence per entry.
      figures: the PNG files it shows.

    Returns:
      The file, which needs no other: the figures are in it.
    """
    name = about["config"]["experiment"]
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{html.escape(question)}</p>",
        "<h2>What was found</h2>",
        "<ul>",
        *(f"<li>{html.escape(line)}</li>" for line in verdict),
        "</ul>",
        f"<pre>{_text(table)}</pre>",
        *(_image(path) for path in figures),
        "<h2>How to repeat it</h2>",
        f"<pre>{html.escape(about['command'])}</pre>",
        "<h2>What was run, and where</h2>",
        f"<pre>{html.escape(json.dumps(about, indent=2))}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title>'
    body = "\n".join(parts)
    page = f"<!doctype html>\n<html><head>{head}<style>{STYLE}</style></head>\n"
    path = directory / NAME
    write(path, f"{page}<body>\n{body}\n</body></html>\n")
    return path


def _text(table: Table) -> str:
    """Returns a table as HTML to be shown in a fixed-width font."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), markup=False)
    console.print(table)
    return console.export_html(inline_styles=True, code_format="{code}")


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem)
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'
