"""`overlayfs log`: how an image came to be."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output, storage
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.store.layers import Layer

HEADINGS = ("LAYER", "CREATED", "AUTHOR", "SIZE", "MESSAGE")


@command(
    "Show the layers of an image.",
    """
    overlayfs log site:v1
    overlayfs log site:v1 --json
    """,
)
@click.argument("image", metavar="IMAGE|WORKSPACE", type=arguments.image_or_workspace)
@storage.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")
def log(image: str, store: bytes | None, as_json: bool, quiet: bool) -> None:
    """Show the layers of an image or a workspace, newest first: id, time, author, size, message."""
    with storage.opened(store) as opened:
        found = opened.stack_of(image)
    if as_json:
        output.show_json({"layers": [_document(layer) for layer in found]})
    elif quiet:
        for layer in found:
            click.echo(layer.id)
    else:
        output.show_table(HEADINGS, [_row(layer) for layer in found])


def _document(layer: "Layer") -> dict[str, object]:
    record = layer.record
    return {
        "id": record.id,
        "created": record.created,
        "author": record.author,
        "message": record.message,
        "size": record.size,
        "state": record.state,
        "digest": record.digest,
    }


def _row(layer: "Layer") -> tuple[str, ...]:
    record = layer.record
    return (
        storage.short(record.id),
        storage.time_text(record.created),
        storage.first_line(record.author) or "-",
        storage.size_text(record.size) if record.state == "complete" else record.state,
        storage.first_line(record.message),
    )
