"""`overlayfs diff`: what the upper of a mount changes."""

import os
from collections import Counter

import click

from overlayfs_cli import arguments, output
from overlayfs_cli.command import command

WORDS = {"A": "added", "C": "changed", "D": "deleted"}


@command(
    "List what a mount changes.",
    """
    overlayfs diff /mnt
    overlayfs diff /mnt --stat
    """,
)
@click.argument("mountpoint", metavar="MNT", type=arguments.path)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--stat", is_flag=True, help="Print only how many paths were added, changed and deleted.")
def diff(mountpoint: bytes, as_json: bool, stat: bool) -> None:
    """List what was added (A), changed (C) and deleted (D) in MNT since its layers were made."""
    changes = _changes(mountpoint)
    if as_json and stat:
        output.show_json(_counts(changes))
    elif as_json:
        output.show_json({"changes": [{"kind": kind, "path": os.fsdecode(path)} for kind, path in changes]})
    elif stat:
        click.echo(", ".join(f"{count} {word}" for word, count in _counts(changes).items()))
    else:
        for kind, path in changes:
            click.echo(f"{kind} {output.path_text(path)}")


def _changes(mountpoint: bytes) -> list[tuple[str, bytes]]:
    """Return (kind, path from the root of the mount) by path."""
    from overlayfs.mount import control

    found = control.request(mountpoint, "diff")["changes"]
    return sorted(((kind, b"/" + os.fsencode(path).lstrip(b"/")) for kind, path in found), key=lambda change: change[1])


def _counts(changes: list[tuple[str, bytes]]) -> dict[str, int]:
    counted = Counter(kind for kind, _ in changes)
    return {word: counted[kind] for kind, word in WORDS.items()}
