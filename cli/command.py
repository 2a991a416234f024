"""The decorator of every command: its line in the list of commands, and examples at the end of its help."""

import textwrap
from collections.abc import Callable
from typing import Any

import click


def command(summary: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Return the decorator that makes a function a command; `example` is one or more command lines."""
    return click.command(short_help=summary, epilog=example_block(example))


def example_block(example: str) -> str:
    """Return command lines as the end of a help text; `\\b` keeps click from rewrapping them."""
    return "\b\nExample:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ")
