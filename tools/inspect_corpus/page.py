"""The report of `tools.inspect_corpus` as one page of HTML that needs nothing from outside."""

from collections.abc import Sequence
from html import escape
from typing import Any

from tools.shared.outputs import HTML_MARK

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { overflow-wrap: anywhere; }
table { border-collapse: collapse; }
td, th { padding: .1em .8em .1em 0; text-align: right; white-space: nowrap; }
td:last-child, th:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; width: 100%; }
.bar { display: block; height: .8em; background: #4a7ab5; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.masked { background: #2458a8; color: #fff; } .random { background: #b3261e; color: #fff; }
.kept { background: #f2d35b; color: #000; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } }
"""


def page(report: dict[str, Any]) -> str:
    """Return the whole page."""
    title = escape(f"{report['prefix']}: {report['documents']:,} documents, {report['tokens']:,} tokens")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        HTML_MARK,
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>{report['empty_documents']:,} empty documents, {report['sequences']:,} sequences,"
        f" {escape(report['dtype'])}</p>",
        _sources(report.get("manifest")),
        _histogram(report["histogram"]),
        _frequent(report.get("frequent", [])),
        _samples(report["samples"]),
        _windows(report.get("windows", [])),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A section with a table of cells that are HTML already; nothing without rows."""
    if not rows:
        return ""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<h2>{escape(title)}</h2>\n<table><tr>{heads}</tr>\n{body}\n</table>"


def _sources(manifest: dict[str, Any] | None) -> str:
    rows = [
        [f"{tally['documents']:,}", f"{tally['tokens']:,}", f"{tally['text_bytes'] / 1e6:,.2f}", escape(name)]
        for name, tally in (manifest["sources"] if manifest else {}).items()
    ]
    return _table("Sources", ["documents", "tokens", "MB", "source"], rows)


def _histogram(bins: list[dict[str, int]]) -> str:
    most = max((entry["documents"] for entry in bins), default=1)
    rows = [
        [
            f"{entry['from']:,} to {entry['to']:,}",
            f"{entry['documents']:,}",
            f'<span class="bar" style="width:{100 * entry["documents"] / most:.2f}%"></span>',
        ]
        for entry in bins
    ]
    return _table("Length of documents in tokens", ["tokens", "documents", ""], rows)


def _frequent(entries: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{entry['count']:,}",
            f"{entry['share']:.2%}",
            str(entry["id"]),
            escape(one_line(entry["text"] or "")),
        ]
        for entry in entries
    ]
    return _table("Most frequent tokens", ["count", "share", "id", "piece"], rows)


def _samples(samples: list[dict[str, Any]]) -> str:
    shown = [
        f"<h3>Document {item['document']:,} ({item['tokens']:,} tokens)</h3>"
        f'<p class="text">{escape(item["text"] if item["text"] is not None else str(item["ids"]))}</p>'
        for item in samples
    ]
    return "\n".join(["<h2>Documents</h2>", *shown]) if shown else ""


def _windows(windows: list[dict[str, Any]]) -> str:
    if not windows:
        return ""
    key = " ".join(f'<span class="{state}">{state}</span>' for state in ("masked", "random", "kept"))
    parts = [f"<h2>A window as each method sees it</h2><p>Predicted: {key}; the rest is context.</p>"]
    for window in windows:
        text = "".join(
            f'<span class="{state}"{_title(state, true)}>{_text(true if state == "masked" else shown)}</span>'
            for state, true, shown in window["pieces"]
        )
        parts.append(f'<h3>{escape(window["method"])}</h3><p class="text">{text}</p>')
    return "\n".join(parts)


def _title(state: str, true: str) -> str:
    return f' title="{escape(true)}"' if state == "random" else ""


def one_line(text: str) -> str:
    """Text of a piece for a cell of a table."""
    return text.replace("\n", "\\n").replace("\t", "\\t")


def _text(piece: str) -> str:
    return escape(piece.replace("\u2581", " "))
