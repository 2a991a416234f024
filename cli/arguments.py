"""Types of arguments that several commands take: how they are converted, and how a shell completes them.

Paths are bytes as soon as they are read. Completion must not fail: what cannot be read has no candidates.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

import click
from click.shell_completion import CompletionItem

from overlayfs.errors import UsageError, UserError


class _Path(click.Path):
    """A path as bytes. Whether it exists is checked by the command, which can say what is missing."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        return path_bytes(str(value))


class _Operand(_Path):
    """A path, or a name of one of the given kinds (mount, image, workspace), as bytes."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self._kinds = kinds

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        named = list(_candidates(self._kinds, ctx, incomplete))
        return named or super().shell_complete(ctx, param, incomplete)


class _Name(click.types.StringParamType):
    """A name of one of the given kinds (image, workspace), as text. `or_directory`: completed as a directory, too."""

    def __init__(self, *kinds: str, or_directory: bool = False) -> None:
        self._kinds = kinds
        self._or_directory = or_directory

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        named = list(_candidates(self._kinds, ctx, incomplete))
        return named or ([CompletionItem(incomplete, type="dir")] if self._or_directory else [])


def path_bytes(given: str) -> bytes:
    """Return a path as bytes; UsageError if it is empty."""
    if not given:
        raise UsageError("an empty path is given")
    return os.fsencode(given)


path = _Path()
mountpoint = _Operand("mount")
mountpoint_or_workspace = _Operand("mount", "workspace")
operand = _Operand("mount", "workspace", "image")
image = _Name("image")
image_or_workspace = _Name("image", "workspace")
image_or_directory = _Name("image", or_directory=True)


def text(given: str) -> bytes:
    """Return an argument as bytes."""
    return os.fsencode(given)


def _candidates(kinds: Iterable[str], ctx: click.Context, incomplete: str) -> Iterator[CompletionItem]:
    for kind in kinds:
        with contextlib.suppress(UserError, OSError):
            names = _mounts() if kind == "mount" else _stored(kind, ctx.params.get("store"))
            yield from (CompletionItem(name, help=kind) for name in names if name.startswith(incomplete))


def _mounts() -> list[str]:
    from overlayfs.mount import mounts

    return [os.fsdecode(mount.mountpoint) for mount in mounts.list_mounts()]


def _stored(kind: str, store: bytes | None) -> list[str]:
    """Return the names of the images or workspaces of a store; a store that does not exist is not created."""
    from overlayfs import Store
    from overlayfs_cli import store_option

    with Store(store_option.path(store), create=False) as opened:
        return [each.name for each in (opened.images() if kind == "image" else opened.workspaces())]
