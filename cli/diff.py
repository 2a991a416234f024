"""`overlayfs diff`: what changes a mount, a workspace or an image makes, or what tells it from another one."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output, progress, storage
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
@click.argument("what", metavar="MNT|WORKSPACE|IMAGE", type=arguments.path)
@click.argument("base", metavar="[IMAGE]", required=False, type=arguments.path)
@storage.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--stat", is_flag=True, help="Print only how many paths and bytes were added, changed and deleted.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def diff(what: bytes, base: bytes | None, store: bytes | None, as_json: bool, stat: bool, quiet: bool) -> None:
    """List what was added (A), changed (C) and deleted (D).

    A mount or workspace is compared with its layers, an image with what lies below its top layer; with a second name,
    whatever it stands for, with that. A path is changed when its content, its attributes or its hard links are.
    """
    with ExitStack() as held, progress.line(quiet) as show:
        comparison = _Comparison(store, held)
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
    """What two arguments stand for. The store is opened when the first of them is looked for in it."""

    def __init__(self, store: bytes | None, held: ExitStack) -> None:
        self._store = store
        self._held = held

    def changes(self, what: bytes, base: bytes | None, sizes: bool, tell: Callable[[int], None]) -> "list[Change]":
        """Return all changes, by path."""
        from overlayfs.store import compare, diff_operands

        mount = _mount_at(what)
        tree = self._tree(what, mount)
        if base is not None:
            return list(compare.compare(self._tree(base, _mount_at(base)), tree, tell))
        below = diff_operands.below(tree)
        if mount is None or mount.upper is None:
            return _without_root(compare.compare(below, tree, tell))
        told = _told_by(mount.mountpoint)
        return list(compare.measured(below, tree, told)) if sizes else told

    def _tree(self, given: bytes, mount: "Mount | None") -> "Tree":
        from overlayfs.mount import mounts
        from overlayfs.store import diff_operands

        if mount is not None:
            return self._tree_of_mount(mount)
        if given.startswith((b"/", b".")):
            mounts.find(given)  # says that it is no mount
        name = os.fsdecode(given)
        opened = self._held.enter_context(storage.opened(self._store))
        self._held.enter_context(diff_operands.hold(opened, name))
        workspace = opened.find_workspace(name)
        if workspace is not None:
            _write_out(workspace.upper_path)
        return diff_operands.named(opened, name)

    def _tree_of_mount(self, mount: "Mount") -> "Tree":
        from overlayfs.store import diff_operands

        if mount.upper is None or mount.work is None:
            return diff_operands.plain_directories(mount.lower)
        _write_out(mount.upper)
        return diff_operands.over(mount.upper, mount.work, mount.lower)


def _mount_at(given: bytes) -> "Mount | None":
    from overlayfs.mount import mounts

    path = mounts.resolved(given)
    return next((mount for mount in reversed(mounts.list_mounts()) if mount.mountpoint == path), None)


def _write_out(upper: bytes) -> None:
    """Have what was written through a memory map of a mount, if this is the upper of one, in the upper."""
    from overlayfs.mount import control, mounts

    for mount in mounts.list_mounts():
        if mount.upper == upper:
            control.request(mount.mountpoint, "sync")


def _told_by(mountpoint: bytes) -> "list[Change]":
    """Return what the daemon of a mount says that its upper changes."""
    from overlayfs.mount import control
    from overlayfs.store.compare import Change

    found = control.request(mountpoint, "diff")["changes"]
    return sorted((Change(kind, os.fsencode(path).lstrip(b"/")) for kind, path in found), key=lambda each: each.path)


def _without_root(changes: "Iterator[Change]") -> "list[Change]":
    # The root is not a path that anybody has named: its time moves with every change right below it.
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
    return f"{words}; {storage.size_text(sizes['bytes_in'])} in, {storage.size_text(sizes['bytes_out'])} out"
