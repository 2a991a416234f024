"""`overlayfs tag`: gives an image a second name."""

import click

from overlayfs_cli import arguments, store_option
from overlayfs_cli.command import command


@command(
    "Give an image another name.",
    """
    overlayfs tag site:v1 site:stable
    """,
)
@click.argument("image", metavar="IMAGE", type=arguments.image)
@click.argument("name", metavar="NAME")
@store_option.option
def tag(image: str, name: str, store: bytes | None) -> None:
    """Make NAME[:TAG] a name of the layers of IMAGE too; an image that had the name before loses it."""
    with store_option.opened(store) as opened:
        opened.images.tag(image, name)
