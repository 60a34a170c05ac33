"""The look of our HTML pages: one template, one style, and the few kinds of things that a section is made of. A page
stands alone: no script, no network.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto;
  margin: .7rem 0; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid #999; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
p { max-width: 60rem; } code { background: #f4f4f4; padding: .1rem .3rem; overflow-wrap: anywhere; }
ul { color: #555; font-size: .9rem; padding-left: 1.2rem; } details { color: #444; } details summary {
  cursor: pointer; color: #0072b2; }
svg { max-width: 100%; height: auto; display: block; margin: 1rem 0; } nav a { margin-right: 1rem; color: #0072b2; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ intro }}</p>
<nav>{% for section in sections %}<a href="#{{ section.name }}">{{ section.name }}</a>{% endfor %}</nav>
{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.title }}</h2>
{% for part in section.parts %}{{ part | safe }}
{% endfor %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """name: of its anchor, without spaces; parts: HTML, one below the other,
    made by the functions here or by a figure.
    """

    name: str
    title: str
    parts: Sequence[str]


def render(title: str, intro: str, sections: Sequence[Section]) -> str:
    """The page. ``title``, ``intro`` and the names and titles of sections are text."""
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(TEMPLATE).render(title=title, intro=intro, sections=sections)


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    return f"<p><code>{html.escape(text)}</code></p>"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row)
        for cell, row in (("th", titles), *(("td", row) for row in rows))
    ]
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


def details(summary: str, content: str, is_open: bool = False) -> str:
    """``content``, HTML, behind a line of text that shows and hides it."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>{content}</details>"


def as_html(markdown_text: str) -> str:
    """The tables and lists of our own markdown, which has nothing else."""
    out, kind = [], ""
    for line in markdown_text.strip().splitlines():
        is_row, is_item = line.startswith("|"), line.startswith("- ")
        wanted = "table" if is_row else "ul" if is_item else ""
        if wanted != kind:
            out += [f"</{kind}>"] * bool(kind) + [f"<{wanted}>"] * bool(wanted)
        if is_row and not re.fullmatch(r"[|\-]+", line):
            cell = "th" if kind != "table" else "td"
            out.append(
                "<tr>"
                + "".join(f"<{cell}>{html.escape(text.strip())}</{cell}>" for text in line.strip("|").split("|"))
                + "</tr>"
            )
        elif is_item:
            out.append(f"<li>{html.escape(line[2:])}</li>")
        kind = wanted
    return "\n".join(out + [f"</{kind}>"] * bool(kind))
