"""Types of arguments that several commands take. Paths are bytes as soon as they are read."""

import os
from typing import Any

import click


class _Path(click.ParamType):
    """A path as bytes; whether anything is there is for the command to find out, whose sentence says more."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Return the bytes behind what the shell gave; an empty path is refused."""
        path = os.fsencode(value)
        if not path:
            self.fail("is empty, a path is needed", param, ctx)
        return path


class _Text(click.ParamType):
    """Bytes that are no path, such as the value of -o."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Return the bytes behind what the shell gave."""
        return os.fsencode(value)


DIRECTORY = _Path()
OPTION_STRING = _Text()
