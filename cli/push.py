"""`overlayfs push`: push an image to a registry."""

import click

from overlayfs_cli import arguments, output, progress, registry, store_option
from overlayfs_cli.command import command


@command(
    "Push an image to a registry.",
    """
    overlayfs push site:v1 quay.io/team/site:v1
    overlayfs push site:v1 localhost:5000/site --plain-http
    """,
)
@click.argument("image", metavar="IMAGE", type=arguments.image)
@click.argument("reference", metavar="REGISTRY/REPO[:TAG]")
@registry.plain_http
@registry.ca
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the digest; no progress on the terminal.")
def push(
    image: str, reference: str, plain_http: bool, ca: str | None, store: bytes | None, as_json: bool, quiet: bool
) -> None:
    """Push an image to a registry, and print its reference and digest. Layers that the registry has are not sent.

    Logins are those of podman and docker. The same image always gives the same digest.
    """
    with store_option.opened(store) as opened, registry.lines(quiet) as (show, notice):
        pushed = opened.push(image, reference, plain_http=plain_http, ca=ca, progress=show, notice=notice)
    if pushed.same is False and not quiet:
        progress.note("the digest is not that of the pulled image: its layers had to be compressed again")
    if as_json:
        layers = [layer._asdict() for layer in reversed(pushed.layers)]
        output.show_json({"reference": reference, "digest": pushed.digest, "layers": layers})
    else:
        click.echo(pushed.digest if quiet else f"{reference} {pushed.digest}")
