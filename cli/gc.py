"""`overlayfs gc`: what nothing needs goes."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import output, progress, storage
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs import Store

HEADINGS = ("KIND", "NAME", "SIZE")


@command(
    "Delete what nothing in the store needs.",
    """
    overlayfs gc --dry-run
    overlayfs gc
    """,
)
@storage.option
@click.option("--dry-run", is_flag=True, help="Say what would go and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print the names alone.")
def gc(store: bytes | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Delete layers that no image and no workspace names, ephemeral workspaces, and what killed processes left.

    What is mounted or being made stays. --dry-run prints exactly what would go. Layers that a killed process has left
    unhashed are hashed.
    """
    with storage.opened(store) as opened, progress.waiting("deleting", quiet or dry_run):
        gone = opened.gc(dry_run)
        if not dry_run:
            _finish(opened)
    if as_json:
        output.show_json({"garbage": [each._asdict() for each in gone], "size": sum(each.size for each in gone)})
    elif quiet:
        for each in gone:
            click.echo(each.name)
    else:
        output.show_table(HEADINGS, [(each.kind, each.name, storage.size_text(each.size)) for each in gone])


def _finish(store: "Store") -> None:
    from overlayfs.store import hashing

    hashing.hash_unfinished(store)
