"""`overlayfs gc`: deletes what nothing in the store needs."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import output, progress, store_option
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
@store_option.option
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the names.")
def gc(store: bytes | None, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Delete layers that no image and no workspace uses, ephemeral workspaces, and what killed processes have left.

    What is mounted or being made is kept. --dry-run prints exactly what would be deleted. Layers that a killed process
    has left unhashed are hashed.
    """
    with store_option.opened(store) as opened, progress.waiting("deleting", quiet or dry_run):
        garbage = opened.gc(dry_run)
        if not dry_run:
            _hash_unfinished(opened)
    if as_json:
        output.show_json({"garbage": [each._asdict() for each in garbage], "size": sum(each.size for each in garbage)})
    elif quiet:
        for each in garbage:
            click.echo(each.name)
    else:
        output.show_table(HEADINGS, [(each.kind, each.name, output.size_text(each.size)) for each in garbage])


def _hash_unfinished(store: "Store") -> None:
    from overlayfs.store import hashing

    hashing.hash_unfinished(store)
