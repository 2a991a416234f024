"""`overlayfs diff`: lists the changes of a mount, a workspace or an image, or between two of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output, progress, store_option
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.mount.mounts import Mount
    from overlayfs.store.compare import Change, Tree

WORDS = {"A": "added", "C": "changed", "D": "deleted"}


@command(
    "List what a mount, a workspace or an image changes.",
    """
    overlayfs diff /mnt
    overlayfs diff site:2 site:1 --stat     # what site:2 has that site:1 has not
    """,
)
@click.argument("what", metavar="MNT|WORKSPACE|IMAGE", type=arguments.operand)
@click.argument("base", metavar="[IMAGE]", required=False, type=arguments.operand)
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--stat", is_flag=True, help="Print only how many paths and bytes were added, changed and deleted.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def diff(what: bytes, base: bytes | None, store: bytes | None, as_json: bool, stat: bool, quiet: bool) -> None:
    """List what was added (A), changed (C) and deleted (D).

    A mount or workspace is compared with its layers, an image with the layers below its top one; with a second name,
    whatever it stands for, with that. A path is changed when its content, its attributes or its hard links are.
    """
    with ExitStack() as holds, progress.line(quiet) as show:
        comparison = _Comparison(store, holds)
        changes = comparison.changes(what, base, stat, lambda count: show(f"{count} paths compared"))
    if as_json and stat:
        output.show_json({**_counts(changes), **_sizes(changes)})
    elif as_json:
        listed = [{"kind": each.kind, "path": os.fsdecode(_shown(each.path))} for each in changes]
        output.show_json({"changes": listed})
    elif stat:
        click.echo(_summary(changes))
    else:
        for each in changes:
            click.echo(f"{each.kind} {output.path_text(_shown(each.path))}")


class _Comparison:
    """Finds what the arguments name, and compares it. The store is opened when the first of them is looked up in it."""

    def __init__(self, store: bytes | None, holds: ExitStack) -> None:
        self._store = store
        self._holds = holds

    def changes(self, what: bytes, base: bytes | None, sizes: bool, progress: Callable[[int], None]) -> "list[Change]":
        """Return all changes, by path; with `sizes` each has how many bytes it adds and removes."""
        from overlayfs.mount.control_client import Client
        from overlayfs.store import compare, diff_operands

        mount = _mount_at(what)
        tree = self._tree(what, mount)
        if base is not None:
            return list(compare.compare(self._tree(base, _mount_at(base)), tree, progress))
        below = diff_operands.without_top(tree)
        if mount is None or mount.upper is None:
            return _without_root(compare.compare(below, tree, progress))
        found = [compare.Change(kind, path.lstrip(b"/")) for kind, path in Client(mount).diff()]
        found.sort(key=lambda each: each.path)
        return list(compare.measured(below, tree, found)) if sizes else found

    def _tree(self, name: bytes, mount: "Mount | None") -> "Tree":
        from overlayfs.mount import mounts
        from overlayfs.store import diff_operands

        if mount is not None:
            return self._tree_of_mount(mount)
        if name.startswith((b"/", b".")):
            mounts.find(name)  # UserError: it is not a mount
        opened = self._holds.enter_context(store_option.opened(self._store))
        self._holds.enter_context(diff_operands.hold(opened, os.fsdecode(name)))
        workspace = opened.workspaces.get(os.fsdecode(name))
        if workspace is not None:
            _sync_upper(workspace.upper_path)
        return diff_operands.named(opened, os.fsdecode(name))

    def _tree_of_mount(self, mount: "Mount") -> "Tree":
        from overlayfs.mount.control_client import Client
        from overlayfs.store import compare, diff_operands

        if mount.upper is None or mount.work is None:
            return compare.Tree(mount.lower)
        Client(mount).sync()
        return diff_operands.of_upper(mount.upper, mount.work, mount.lower)


def _mount_at(path: bytes) -> "Mount | None":
    from overlayfs.mount import mounts

    mountpoint = mounts.resolved(path)
    return next((mount for mount in reversed(mounts.list_mounts()) if mount.mountpoint == mountpoint), None)


def _sync_upper(upper: bytes) -> None:
    """Have the mount of an upper, if there is one, write back what was stored through memory maps of its files."""
    from overlayfs.mount import mounts
    from overlayfs.mount.control_client import Client

    for mount in mounts.list_mounts():
        if mount.upper == upper:
            Client(mount).sync()


def _without_root(changes: "Iterator[Change]") -> "list[Change]":
    # The root is no change of its own: its mtime follows every change to its entries.
    return [each for each in changes if each.path]


def _shown(path: bytes) -> bytes:
    return b"/" + path


def _counts(changes: "list[Change]") -> dict[str, int]:
    return {word: sum(each.kind == kind for each in changes) for kind, word in WORDS.items()}


def _sizes(changes: "list[Change]") -> dict[str, int]:
    return {
        "bytes_in": sum(each.after for each in changes),
        "bytes_out": sum(each.before for each in changes),
    }


def _summary(changes: "list[Change]") -> str:
    words = ", ".join(f"{count} {word}" for word, count in _counts(changes).items())
    sizes = _sizes(changes)
    return f"{words}; {output.size_text(sizes['bytes_in'])} in, {output.size_text(sizes['bytes_out'])} out"
