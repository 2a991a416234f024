"""`overlayfs commit`: the changes in an upper become a layer."""

import contextlib
import os

import click

from overlayfs.errors import UsageError
from overlayfs_cli import arguments, output
from overlayfs_cli.command import command
from overlayfs_cli.workplace import work_beside


@command(
    "Make the changes in an upper a new layer.",
    """
    overlayfs commit /mnt --to /layers/new     # the mount goes on
    overlayfs commit --upper /data/up --lower /layers/top --lower /layers/base --to /layers/new
    """,
)
@click.argument("mountpoint", metavar="[MNT]", required=False, type=arguments.path)
@click.option(
    "--to", "destination", metavar="DIR", required=True, type=arguments.path, help="The layer to make; must not exist."
)
@click.option("--upper", metavar="DIR", type=arguments.path, help="An upper that is not mounted.")
@click.option("--lower", metavar="DIR", multiple=True, type=arguments.path, help="Its layers, top first.")
@click.option("--work", metavar="DIR", type=arguments.path, help="Its work directory [UPPER.work].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def commit(
    mountpoint: bytes | None,
    destination: bytes,
    upper: bytes | None,
    lower: tuple[bytes, ...],
    work: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the changes in MNT, or in an unmounted upper, into the new layer directory DIR, and print its path."""
    target = os.path.join(os.getcwdb(), destination)
    if mountpoint is not None and upper is None:
        if lower or work:
            raise UsageError("--lower and --work describe an unmounted upper; leave them out with a mount point")
        _commit_mount(mountpoint, target)
    elif upper is not None and mountpoint is None:
        _commit_upper(upper, work, lower, target)
    else:
        raise UsageError("give either a mount point or --upper with its --lower; see 'overlayfs commit --help'")
    _show(target, as_json)


def _show(layer: bytes, as_json: bool) -> None:
    if as_json:
        output.show_json({"layer": output.json_text(layer)})
    else:
        click.echo(output.path_text(layer))


def _commit_mount(mountpoint: bytes, target: bytes) -> None:
    from overlayfs.mount import control

    control.request(mountpoint, "commit", destination=os.fsdecode(target))


def _commit_upper(upper: bytes, work: bytes | None, lower: tuple[bytes, ...], target: bytes) -> None:
    if not lower:
        raise UsageError("--upper needs the layers it lies on; name them with --lower, top first")
    from overlayfs.fs.config import StackConfig
    from overlayfs.store.commit import commit_unmounted

    with contextlib.nullcontext(work) if work else work_beside(upper) as place:
        commit_unmounted(StackConfig(lower, upper, place), target)
