"""`overlayfs layers`: lists the layers of the store."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import output, store_option
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.store.layers import Layer

HEADINGS = ("LAYER", "STATE", "CREATED", "SIZE", "ENTRIES", "IMAGES", "MESSAGE")
IMAGES_SHOWN = 2


@command(
    "List the layers of the store.",
    """
    overlayfs layers
    overlayfs layers -q
    """,
)
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the ids.")
def layers(store: bytes | None, as_json: bool, quiet: bool) -> None:
    """List layers, oldest first, with the images that use them."""
    with store_option.opened(store) as opened:
        found = sorted(opened.layers(), key=lambda layer: (layer.record.created, layer.id))
        users = {} if quiet else store_option.images_by_layer(opened)
    output.show_list(
        "layers",
        documents=(_document(layer, users.get(layer.id, [])) for layer in found),
        names=(layer.id for layer in found),
        headings=HEADINGS,
        rows=(_row(layer, users.get(layer.id, [])) for layer in found),
        as_json=as_json,
        quiet=quiet,
    )


def _document(layer: "Layer", images: list[str]) -> dict[str, object]:
    record = layer.record
    return {
        "id": record.id,
        "state": record.state,
        "created": record.created,
        "author": record.author,
        "message": record.message,
        "digest": record.digest,
        "diff_id": record.diff_id,
        "size": record.size,
        "own": record.size if len(images) <= 1 else 0,
        "shared": record.size if len(images) > 1 else 0,
        "entries": record.entries,
        "flags": list(record.flags),
        "below": list(record.below),
        "same_as": record.same_as,
        "images": images,
        "path": output.json_text(layer.tree_path),
    }


def _row(layer: "Layer", images: list[str]) -> tuple[str, ...]:
    record = layer.record
    known = record.state == "complete"
    more = len(images) - IMAGES_SHOWN
    shown = ", ".join(images[:IMAGES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return (
        output.short_id(record.id),
        record.state,
        output.time_text(record.created),
        output.size_text(record.size) if known else "-",
        str(record.entries) if known else "-",
        shown or "-",
        output.first_line(record.message),
    )
