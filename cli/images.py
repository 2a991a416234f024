"""`overlayfs images`: lists the images of the store."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import output, store_option
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs import Store
    from overlayfs.store.records import ImageRecord

HEADINGS = ("IMAGE", "LAYERS", "CREATED", "SIZE", "OWN", "SHARED")


@command(
    "List the images of the store.",
    """
    overlayfs images
    overlayfs images --json
    """,
)
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the names.")
def images(store: bytes | None, as_json: bool, quiet: bool) -> None:
    """List images: OWN is the size of layers that no other image uses, SHARED that of layers that others use too."""
    with store_option.opened(store) as opened:
        found = list(opened.images())
        users = {} if quiet else store_option.images_by_layer(opened)
        output.show_list(
            "images",
            documents=(_document(opened, image, users) for image in found),
            names=(image.name for image in found),
            headings=HEADINGS,
            rows=(_row(_document(opened, image, users)) for image in found),
            as_json=as_json,
            quiet=quiet,
        )


def _document(store: "Store", image: "ImageRecord", users: dict[str, list[str]]) -> dict[str, object]:
    own = shared = 0
    for layer_id in dict.fromkeys(image.layers):
        size = store.layers.size_of(layer_id)
        own, shared = (own + size, shared) if len(users[layer_id]) == 1 else (own, shared + size)
    return {
        "name": image.name,
        "layers": list(image.layers),
        "created": image.created,
        "author": image.author,
        "architecture": image.architecture,
        "os": image.os,
        "variant": image.variant,
        "size": own + shared,
        "own": own,
        "shared": shared,
    }


def _row(document: dict[str, object]) -> tuple[str, ...]:
    layers = document["layers"]
    assert isinstance(layers, list)
    sizes = (output.size_text(int(str(document[key]))) for key in ("size", "own", "shared"))
    return (str(document["name"]), str(len(layers)), output.time_text(str(document["created"])), *sizes)
