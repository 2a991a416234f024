"""Printing of results: paths, tables and JSON. The output is never coloured, so NO_COLOR needs no code."""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime

import click

_ID_SHOWN = 12
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_ESCAPES = {0x07: "\\a", 0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0B: "\\v", 0x0C: "\\f", 0x0D: "\\r"}


def path_text(path: bytes) -> str:
    """Return a path for one line of output: as it is if it is printable, else in C quotes with escapes, as git does."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and text and not text.startswith('"'):
        return text
    return '"' + "".join(map(_quoted_byte, path)) + '"'


def _quoted_byte(byte: int) -> str:
    if byte in b'"\\':
        return "\\" + chr(byte)
    return chr(byte) if 0x20 <= byte < 0x7F else _ESCAPES.get(byte, f"\\{byte:03o}")


def json_text(path: bytes | None) -> str | None:
    """Return a path for JSON: bytes that are not UTF-8 become lone surrogates, as `os.fsdecode` makes them."""
    return None if path is None else os.fsdecode(path)


def short_id(layer_id: str) -> str:
    """Return the first digits of a layer id, enough for people."""
    return layer_id[:_ID_SHOWN]


def size_text(size: int) -> str:
    """Return a number of bytes for people: three significant digits and a unit."""
    amount = float(size)
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            return f"{size} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1024
    raise AssertionError(size)


def time_text(recorded: str) -> str:
    """Return the time of a record in local time, to the second; other text is returned unchanged."""
    try:
        return datetime.fromisoformat(recorded).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return recorded


def first_line(text: str) -> str:
    """Return the first line of a message, with ``?`` for unprintable characters."""
    line = next(iter(text.splitlines()), "")
    return "".join(character if character.isprintable() else "?" for character in line)


def show_json(document: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2))


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headings, columns aligned; nothing at all if there are no rows."""
    if not rows:
        return
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_json_line(document: object) -> None:
    """Print one JSON document on one line, as one of several."""
    click.echo(json.dumps(document))


def show_list(
    key: str,
    *,
    documents: Iterable[object],
    names: Iterable[str],
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    as_json: bool,
    quiet: bool,
) -> None:
    """Print a list in the form that is asked for: {key: documents} as JSON, the names, or a table.

    The iterables may be generators: only that of the form is consumed.
    """
    if as_json:
        show_json({key: list(documents)})
    elif quiet:
        for name in names:
            click.echo(name)
    else:
        show_table(headings, list(rows))
