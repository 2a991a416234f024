"""`overlayfs export`: write an image as a layout, an archive, a single tar or a directory."""

import os

import click

from overlayfs.errors import UsageError
from overlayfs_cli import arguments, output, progress, store_option
from overlayfs_cli.command import command

_FORMATS = ("oci", "oci-archive", "docker-archive", "tar", "dir")
_COMPRESSIONS = ("gzip", "zstd", "none")


@command(
    "Write an image as a layout, an archive, one tar or a directory.",
    """
    overlayfs export site:v1 -o site.tar                    # an oci-archive, for podman load and skopeo
    overlayfs export site:v1 -o layout/                     # an OCI layout
    overlayfs export site:v1 -o rootfs --format dir         # the files themselves
    overlayfs export site:v1 -o - --format docker-archive | docker load
    """,
)
@click.argument("image", metavar="IMAGE", type=arguments.image)
@click.option(
    "-o", "--output", "destination", metavar="DEST", required=True, type=arguments.path, help="- for standard output."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(_FORMATS),
    help="[oci-archive for -, pipes and names ending in .tar, else oci]",
)
@click.option("--compression", type=click.Choice(_COMPRESSIONS), help="[gzip for oci and oci-archive, else none]")
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def export(
    image: str,
    destination: bytes,
    kind: str | None,
    compression: str | None,
    store: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write IMAGE to DEST, which does not exist yet or is a pipe, and print DEST.

    oci, oci-archive and docker-archive have the layers and the configuration; tar and dir have only the merged tree
    of the image. The same image gives the same bytes.
    """
    chosen = kind or _usual_format(destination)
    to_stdout = destination == b"-"
    _check(chosen, compression, to_stdout, as_json)
    with store_option.opened(store) as opened, progress.line(quiet) as show:
        opened.export_image(
            image,
            destination,
            form=chosen,
            compression=compression,
            progress=lambda layer, layers, done: show(progress.layer_text(layer, layers, done)),
            notice=progress.note,
        )
    if as_json:
        output.show_json({"image": image, "destination": output.json_text(destination), "format": chosen})
    elif not to_stdout:
        click.echo(output.path_text(destination))


def _usual_format(destination: bytes) -> str:
    is_stream = os.path.exists(destination) and not os.path.isdir(destination)
    return "oci-archive" if destination == b"-" or destination.endswith(b".tar") or is_stream else "oci"


def _check(kind: str, compression: str | None, to_stdout: bool, as_json: bool) -> None:
    if kind == "dir" and compression is not None:
        raise UsageError("a directory is not compressed; leave --compression out, or choose another --format")
    if to_stdout and kind in ("oci", "dir"):
        raise UsageError(f"the format {kind} is a directory and cannot go to standard output; choose an archive")
    if to_stdout and as_json:
        raise UsageError("the archive and --json cannot both go to standard output; leave one out")
    if to_stdout and os.isatty(1):
        raise UsageError("an archive is not written to a terminal; redirect standard output, or name a file")
