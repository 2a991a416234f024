"""`overlayfs commit`: the changes in an upper become a layer."""

import contextlib
import os
from collections.abc import Iterator

import click

from overlayfs.errors import InUse, MountError, UsageError, UserError
from overlayfs_cli import arguments, output, progress
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
        made = _commit_mount(mountpoint, target, quiet)
    elif upper is not None and mountpoint is None:
        made = _commit_upper(upper, work, lower, target, quiet)
    else:
        raise UsageError("give either a mount point or --upper with its --lower; see 'overlayfs commit --help'")
    _show(made, as_json)


@contextlib.contextmanager
def _no_mount_meant() -> Iterator[None]:
    """Opening a stack fails with the exit code of a failed mount; here it is a failure like any other."""
    from overlayfs.mount import table

    try:
        yield
    except InUse as error:
        raise UserError(str(table.with_holder(error))) from None
    except MountError as error:
        raise UserError(str(error)) from None


def _show(made: dict[str, object], as_json: bool) -> None:
    if as_json:
        output.show_json(made)
    else:
        click.echo(output.path_text(os.fsencode(str(made["layer"]))))


def _commit_mount(mountpoint: bytes, target: bytes, quiet: bool) -> dict[str, object]:
    from overlayfs.mount import control

    with progress.waiting("committing", quiet):
        made = control.request(mountpoint, "commit", destination=os.fsdecode(target))
    return {name: made[name] for name in ("layer", "entries", "size")}


def _commit_upper(
    upper: bytes, work: bytes | None, lower: tuple[bytes, ...], target: bytes, quiet: bool
) -> dict[str, object]:
    if not lower:
        raise UsageError("--upper needs the layers it lies on; name them with --lower, top first")
    from overlayfs.fs.config import StackConfig
    from overlayfs.store.commit import commit_unmounted

    place = contextlib.nullcontext(work) if work else work_beside(upper)
    with _no_mount_meant(), place as scratch, progress.line(quiet) as show:
        told = commit_unmounted(
            StackConfig(lower, upper, scratch),
            target,
            lambda entries, size: show(f"{entries} entries, {size >> 20} MiB"),
        )
    return {"layer": output.json_text(target), "entries": told.entries, "size": told.size}
