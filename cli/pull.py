"""`overlayfs pull`: pull an image from a registry."""

import click

from overlayfs_cli import output, registry, store_option
from overlayfs_cli.command import command


@command(
    "Pull an image from a registry.",
    """
    overlayfs pull quay.io/team/site:v1
    overlayfs pull docker.io/debian -t base --platform linux/arm64
    overlayfs pull localhost:5000/site:v1 --plain-http
    """,
)
@click.argument("reference", metavar="REGISTRY/REPO[:TAG][@DIGEST]")
@click.option("-t", "--tag", "name", metavar="NAME", help="Name of the image in the store [REGISTRY/REPO:TAG].")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Which one of several platforms [this machine's].")
@registry.plain_http
@registry.ca
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the digest; no progress on the terminal.")
def pull(
    reference: str,
    name: str | None,
    platform: str | None,
    plain_http: bool,
    ca: str | None,
    store: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Pull an image from a registry, and print its name and its digest. Layers that the store has are not downloaded.

    Logins are those of podman and docker. An interrupted pull continues where it stopped when it is run again.
    """
    with store_option.opened(store, create=True) as opened, registry.lines(quiet) as (show, notice):
        pulled = opened.pull(
            reference, name=name, platform=platform, plain_http=plain_http, ca=ca, progress=show,
            notice=notice,
        )  # fmt: skip
    if as_json:
        output.show_json(
            {
                "image": pulled.image.name,
                "digest": pulled.digest,
                "layers": [layer._asdict() for layer in reversed(pulled.layers)],
            }
        )
    else:
        click.echo(pulled.digest if quiet else f"{pulled.image.name} {pulled.digest}")
