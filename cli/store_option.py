"""The option --store: which store a command uses, and who its user is."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from overlayfs_cli import arguments

if TYPE_CHECKING:
    from overlayfs import Store

VARIABLE = "OVERLAYFS_STORE"

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
    """Open the store; it is created if `create`, or if neither --store nor $OVERLAYFS_STORE names it.

    Raises UserError if it cannot be opened.
    """
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


def images_by_layer(store: "Store") -> dict[str, list[str]]:
    """Return the names of the images that use each layer, by layer id."""
    found: dict[str, list[str]] = {}
    for image in store.images():
        for layer_id in dict.fromkeys(image.layers):
            found.setdefault(layer_id, []).append(image.name)
    return found
