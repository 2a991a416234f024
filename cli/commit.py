"""`overlayfs commit`: the changes in an upper become a layer."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from overlayfs.errors import InUse, MountError, UsageError, UserError
from overlayfs_cli import arguments, output, progress, storage
from overlayfs_cli.command import command
from overlayfs_cli.workplace import work_beside

_POLL = 0.1  # seconds between two looks at the hashing: the daemon answers at once, and never calls back

if TYPE_CHECKING:
    from overlayfs import Store
    from overlayfs.store.committing import Commit
    from overlayfs.store.layers import Layer


@command(
    "Make the changes in an upper a new layer.",
    """
    overlayfs commit /mnt -t site:2 -m "Add the shop"     # a mount of an image goes on over the new layer
    overlayfs commit /mnt --to /layers/new                # any mount: a copy, as a plain directory
    overlayfs commit --upper /data/up --lower /layers/top --lower /layers/base --to /layers/new
    """,
)
@click.argument("mountpoint", metavar="[MNT]", required=False, type=arguments.path)
@click.option("-t", "--tag", metavar="IMAGE", help="The image that the new layer becomes the top of.")
@click.option("-m", "--message", metavar="TEXT", default="", help="What the layer's record says of it.")
@click.option("--author", metavar="NAME", help="Who made it [the user].")
@click.option("--allow-empty", is_flag=True, help="Make a layer even if nothing has changed.")
@click.option("--wait", is_flag=True, help="Return when the layer is hashed, not as soon as it can be used.")
@click.option("--to", "destination", metavar="DIR", type=arguments.path, help="Copy to a directory; must not exist.")
@click.option("--upper", metavar="DIR", type=arguments.path, help="An upper that is not mounted.")
@click.option("--lower", metavar="DIR", multiple=True, type=arguments.path, help="Its layers, top first.")
@click.option("--work", metavar="DIR", type=arguments.path, help="Its work directory [UPPER.work].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def commit(
    mountpoint: bytes | None,
    tag: str | None,
    message: str,
    author: str | None,
    allow_empty: bool,
    wait: bool,
    destination: bytes | None,
    upper: bytes | None,
    lower: tuple[bytes, ...],
    work: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the changes in MNT, or in an unmounted upper, a new layer, and print what it is called.

    For a mount of an image that is its id in the store, as soon as it can be used; on a terminal its hashing is shown,
    and goes on in the background when that is interrupted. With --to it is the path DIR of a copy.
    """
    if (mountpoint is None) == (upper is None):
        raise UsageError("give either a mount point or --upper with its --lower; see 'overlayfs commit --help'")
    if mountpoint is not None and (lower or work):
        raise UsageError("--lower and --work describe an unmounted upper; leave them out with a mount point")
    if destination is None:
        _require_mount(mountpoint)
        assert mountpoint is not None
        made = _commit_image(mountpoint, tag, message, storage.author() if author is None else author, allow_empty)
        _show_image(mountpoint, made, as_json, wait, quiet)
        return
    if tag is not None or message or author is not None or allow_empty or wait:
        raise UsageError("-t, -m, --author, --allow-empty and --wait are about a store; leave them out with --to")
    target = os.path.join(os.getcwdb(), destination)
    if mountpoint is not None:
        _show(_commit_mount(mountpoint, target, quiet), as_json)
    elif upper is not None:
        _show(_commit_upper(upper, work, lower, target, quiet), as_json)


def _require_mount(mountpoint: bytes | None) -> None:
    if mountpoint is None:
        raise UsageError("an unmounted upper becomes a plain directory; name it with --to")


def _commit_image(
    mountpoint: bytes, tag: str | None, message: str, author: str, allow_empty: bool
) -> dict[str, object]:
    from overlayfs.mount import control

    return dict(
        control.request(mountpoint, "commit-image", image=tag, message=message, author=author, allow_empty=allow_empty)
    )


def _show_image(mountpoint: bytes, made: dict[str, object], as_json: bool, wait: bool, quiet: bool) -> None:
    """Print the id at once and the hashing meanwhile; a JSON document comes when there is nothing to wait for."""
    layer = str(made["layer"])
    if not as_json:
        click.echo(layer)
    hashed: dict[str, object] = {"state": "hashing"}
    if wait:
        hashed = _follow(mountpoint, layer, quiet)
    elif not quiet and not as_json and sys.stderr.isatty():
        with contextlib.suppress(KeyboardInterrupt):
            hashed = _follow(mountpoint, layer, quiet)
    if as_json:
        output.show_json({**made, "state": hashed["state"], "digest": hashed.get("digest")})
    if hashed["state"] == "failed":
        raise UserError(f"layer {layer} is made, but it could not be hashed: {hashed['told']}")


def _follow(mountpoint: bytes, layer: str, quiet: bool) -> dict[str, object]:
    """Show how the hashing goes on until it ends."""
    from overlayfs.mount import control

    with progress.line(quiet) as show:
        while (found := dict(control.request(mountpoint, "hashing", layer=layer)))["state"] == "hashing":
            show(f"hashing: {found['entries']} entries, {int(found['size']) >> 20} MiB")
            time.sleep(_POLL)
    if found["state"] == "done":
        return {**found, "state": "complete", "digest": found["told"]}
    return found


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


# --- into the store ---------------------------------------------------------------------------------------


def _into_store(source: _Source, wish: _Wish, quiet: bool) -> dict[str, object]:
    from overlayfs.store.committing import Commit
    from overlayfs.store.records import printable

    words = Commit(
        image=wish.image, message=printable(wish.message), author=storage.author(), allow_empty=wish.allow_empty
    )
    with storage.opened(wish.store) as store:
        if source.upper is not None:
            made = _copy_into_store(store, source, words, quiet)
        else:
            assert source.target is not None
            made = _commit_workspace(store, source.target, words, quiet)
        return _document(made, None if wish.image is None else store.image(wish.image).name)


def _document(layer: "Layer", image: str | None) -> dict[str, object]:
    record = layer.record
    return {
        "layer": record.id,
        "image": image,
        "state": record.state,
        "digest": record.digest,
        "entries": record.entries,
        "size": record.size,
    }


def _commit_workspace(store: "Store", name: str, wish: "Commit", quiet: bool) -> "Layer":
    from overlayfs.mount import table
    from overlayfs.store import committing
    from overlayfs.store.workspaces import WorkspaceInUse

    try:
        with _no_mount_meant():
            layer = committing.commit_workspace(store, name, wish)
    except WorkspaceInUse as error:
        raise table.with_mount(error) from None
    with progress.line(quiet) as show:
        return committing.hash_layer(store, layer, _counted(show, "hashing"))


def _copy_into_store(store: "Store", source: _Source, wish: "Commit", quiet: bool) -> "Layer":
    from overlayfs.fs.config import StackConfig
    from overlayfs.store import committing

    if not source.lower:
        raise UsageError("--upper needs the layers it lies on; name them with --lower, top first")
    if wish.image is None:
        raise UsageError("an upper of your own needs -t IMAGE: nothing else would name its layer in the store")
    assert source.upper is not None
    below = [store.layer_of_tree(path) for path in source.lower]
    place = contextlib.nullcontext(source.work) if source.work else work_beside(source.upper)
    with _no_mount_meant(), place as work, progress.line(quiet) as show:
        config = StackConfig(source.lower, source.upper, work)
        return committing.commit_upper(store, config, below, wish, _counted(show, "copying"))


def _counted(show: progress.Show, doing: str) -> Callable[[int, int], None]:
    return lambda entries, size: show(f"{doing} {entries} entries, {size >> 20} MiB")
