"""`overlayfs tag`: a second name for an image."""

import click

from overlayfs_cli import arguments, storage
from overlayfs_cli.command import command


@command(
    "Give an image another name.",
    """
    overlayfs tag site:v1 site:stable
    """,
)
@click.argument("image", metavar="IMAGE", type=arguments.image)
@click.argument("name", metavar="NAME")
@storage.option
def tag(image: str, name: str, store: bytes | None) -> None:
    """Let NAME[:TAG] stand for the layers of IMAGE too; what it stood for before loses the name."""
    with storage.opened(store) as opened:
        opened.images.tag(image, name)
