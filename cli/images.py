"""`overlayfs images`: the names in the store."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import output, storage
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
@storage.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print the names alone.")
def images(store: bytes | None, as_json: bool, quiet: bool) -> None:
    """List images: own bytes lie in layers that no other image uses, shared ones in layers that others use too."""
    with storage.opened(store) as opened:
        if quiet:
            for image in opened.images():
                click.echo(image.name)
            return
        found = _documents(opened)
    if as_json:
        output.show_json({"images": found})
    else:
        output.show_table(HEADINGS, [_row(document) for document in found])


def _documents(store: "Store") -> list[dict[str, object]]:
    users = storage.names_of_layers(store)
    return [_document(store, image, users) for image in store.images()]


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
    sizes = (storage.size_text(int(str(document[key]))) for key in ("size", "own", "shared"))
    return (str(document["name"]), str(len(layers)), storage.time_text(str(document["created"])), *sizes)
