"""Which store a command works on, and how what lies in it is written in a line."""

import os
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from overlayfs_cli import arguments

if TYPE_CHECKING:
    from overlayfs import Store

VARIABLE = "OVERLAYFS_STORE"
_ID_SHOWN = 12
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--store", metavar="DIR", type=arguments.path, help=f"The store [${VARIABLE}, else the user's own]."
)
"""`--store DIR`, given to the command as `store`: bytes or None."""


def path(given: bytes | None) -> bytes:
    """Return the directory of the store: --store, else $OVERLAYFS_STORE, else the user's own."""
    named = given or os.environb.get(VARIABLE.encode())
    if named:
        return named
    if os.geteuid() == 0:
        return b"/var/lib/overlayfs"
    base = os.environb.get(b"XDG_DATA_HOME") or os.path.join(os.path.expanduser(b"~"), b".local/share")
    return os.path.join(base, b"overlayfs")


def opened(given: bytes | None, create: bool = False) -> "Store":
    """Open the store. One that is not there is made if `create`, or if nobody has named it."""
    from overlayfs import Store

    named = given or os.environb.get(VARIABLE.encode())
    return Store(path(given), create=create or not named)


def author() -> str:
    """Return the author of a new layer or image: the login name of the user, or their uid if they have none."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def short(layer_id: str) -> str:
    """Return as much of an id as people read."""
    return layer_id[:_ID_SHOWN]


def size_text(size: int) -> str:
    """Return a number of bytes for people: three digits and a unit."""
    amount = float(size)
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            return f"{size} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1024
    raise AssertionError(size)


def time_text(recorded: str) -> str:
    """Return a time of a record in local time, to the second; what is no time stays as it is."""
    try:
        return datetime.fromisoformat(recorded).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return recorded


def first_line(text: str) -> str:
    """Return the first line of a message, fit for a line of output."""
    line = next(iter(text.splitlines()), "")
    return "".join(character if character.isprintable() else "?" for character in line)


def names_of_layers(store: "Store") -> dict[str, list[str]]:
    """Return the names of the images that use each layer, by id."""
    found: dict[str, list[str]] = {}
    for image in store.images():
        for layer_id in dict.fromkeys(image.layers):
            found.setdefault(layer_id, []).append(image.name)
    return found
