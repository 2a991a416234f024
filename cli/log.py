"""`overlayfs log`: lists the layers of an image or a workspace."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output, store_option
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
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the ids.")
def log(image: str, store: bytes | None, as_json: bool, quiet: bool) -> None:
    """Show the layers of an image or a workspace, newest first: id, time, author, size, message."""
    with store_option.opened(store) as opened:
        found = opened.stack_of(image)
    output.show_list(
        "layers",
        documents=(_document(layer) for layer in found),
        names=(layer.id for layer in found),
        headings=HEADINGS,
        rows=(_row(layer) for layer in found),
        as_json=as_json,
        quiet=quiet,
    )


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
        output.short_id(record.id),
        output.time_text(record.created),
        output.first_line(record.author) or "-",
        output.size_text(record.size) if record.state == "complete" else record.state,
        output.first_line(record.message),
    )
