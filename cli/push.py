"""`overlayfs push`: an image into a registry."""

import click

from overlayfs_cli import output, registry, storage
from overlayfs_cli.command import command


@command(
    "Send an image to a registry.",
    """
    overlayfs push site:v1 quay.io/team/site:v1
    overlayfs push site:v1 localhost:5000/site --plain-http
    """,
)
@click.argument("image", metavar="IMAGE")
@click.argument("reference", metavar="REGISTRY/REPO[:TAG]")
@registry.plain_http
@registry.ca
@storage.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print the digest alone; no progress on the terminal.")
def push(
    image: str, reference: str, plain_http: bool, ca: str | None, store: bytes | None, as_json: bool, quiet: bool
) -> None:
    """Send an image to a registry, layers that are not there yet alone, and print where it is and its digest.

    Logins are those of podman and docker. The same image gives the same digest, whoever pushes it and when.
    """
    with storage.opened(store) as opened, registry.lines(quiet) as (progress, notice):
        pushed = opened.push(image, reference, plain_http=plain_http, ca=ca, progress=progress, notice=notice)
    if pushed.same is False and not quiet:
        registry.note("the digest is not that of the pulled image: its layers had to be compressed again")
    if as_json:
        layers = [layer._asdict() for layer in reversed(pushed.layers)]
        output.show_json({"reference": reference, "digest": pushed.digest, "layers": layers})
    else:
        click.echo(pushed.digest if quiet else f"{reference} {pushed.digest}")
