"""`overlayfs import`: make an image of a directory, a layer, or an image in another format."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output, progress, store_option
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.store.records import ImageRecord


@command(
    "Make an image of a directory, a layer or an archive.",
    """
    overlayfs import ./rootfs -t base
    overlayfs import image.tar -t site:v1
    podman save --format oci-archive quay.io/team/site | overlayfs import - -t site
    """,
)
@click.argument("source", metavar="SRC", type=arguments.path)
@click.option("-t", "--tag", "name", metavar="IMAGE", required=True, help="Name of the image.")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Which one of several platforms [this machine's].")
@click.option("-m", "--message", metavar="TEXT", default="", help="Description of a layer without a history.")
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def import_(
    source: bytes, name: str, platform: str | None, message: str, store: bytes | None, as_json: bool, quiet: bool
) -> None:
    """Import SRC into the store as an image, and print its name.

    SRC is a directory, a layer (tar, plain or compressed with gzip or zstd), an OCI layout, an oci-archive, a
    docker-archive, or - for one of these archives on standard input. SRC:NAME is one of several images in it. Layers
    that the store has are not read again.
    """
    with store_option.opened(store, create=True) as opened, progress.line(quiet) as show:
        made = opened.import_image(
            source,
            name,
            platform=platform,
            author=store_option.author(),
            message=message,
            progress=lambda layer, layers, done: show(progress.layer_text(layer, layers, done)),
            notice=progress.note,
        )
    _show(made, as_json)


def _show(made: "ImageRecord", as_json: bool) -> None:
    if as_json:
        output.show_json({"image": made.name, "layers": list(made.layers)})
    else:
        click.echo(made.name)
