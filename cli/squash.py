"""`overlayfs squash`: makes one layer of several."""

import click

from overlayfs_cli import arguments, output, progress, store_option
from overlayfs_cli.command import command


@command(
    "Make one layer of the topmost layers of an image.",
    """
    overlayfs squash site -t site:small
    overlayfs squash site -t site:small --last 2
    """,
)
@click.argument("image", metavar="IMAGE", type=arguments.image)
@click.option("-t", "--tag", "name", metavar="NAME", required=True, help="The name of the new image.")
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="Only the N topmost layers [all].")
@click.option("-m", "--message", metavar="TEXT", default="", help="A description of the new layer.")
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the layer's id, and no progress.")
def squash(
    image: str, name: str, last: int | None, message: str, store: bytes | None, as_json: bool, quiet: bool
) -> None:
    """Make one layer of the topmost layers of IMAGE, and an image NAME that shows the same tree; IMAGE is kept.

    Hard links, holes and attributes are preserved. The new layer hides what the old ones hid, and can be read without
    the layers below it.
    """
    with store_option.opened(store) as opened, progress.line(quiet) as show:
        made = opened.squash(
            image,
            name,
            last,
            message=message,
            author=store_option.author(),
            progress=lambda entries, size: show(f"{entries} entries, {output.size_text(size)}"),
            hash_progress=lambda entries, size: show(f"reading it again: {entries} entries, {output.size_text(size)}"),
        )
        layer = opened.layers.find(made.layers[0])
    if as_json:
        record = layer.record
        output.show_json({
            "image": made.name, "layer": layer.id, "layers": list(made.layers),
            "size": record.size, "entries": record.entries,
        })  # fmt: skip
    else:
        click.echo(layer.id)
