"""`overlayfs commit`: the changes in an upper become a layer."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from overlayfs.errors import InUseError, MountError, UsageError, UserError
from overlayfs_cli import arguments, output, progress, storage
from overlayfs_cli.command import command
from overlayfs_cli.default_workdir import default_workdir

_POLL = 0.1  # seconds between two looks at the hashing: the daemon answers at once, and never calls back

if TYPE_CHECKING:
    from overlayfs import Store
    from overlayfs.store.commit import CommitRequest
    from overlayfs.store.layers import Layer


@command(
    "Make the changes in an upper a new layer.",
    """
    overlayfs commit /mnt -t site:v2 -m "Add the shop"     # the mount goes on, over the new layer
    overlayfs commit draft -t site:v2                      # a workspace that is not mounted
    overlayfs commit /mnt --to /layers/new                 # a copy, as a plain directory
    overlayfs commit --upper /data/up --lower /layers/top --lower /layers/base --to /layers/new
    """,
)
@click.argument("target", metavar="[MNT|WORKSPACE]", required=False, type=arguments.path)
@click.option("-t", "--tag", "image", metavar="IMAGE", help="The image that the new layer becomes the top of.")
@click.option("-m", "--message", metavar="TEXT", default="", help="What the layer's record says of it.")
@click.option("--author", metavar="NAME", help="Who made it [the user].")
@click.option("--allow-empty", is_flag=True, help="Make a layer even if nothing has changed.")
@click.option("--wait", is_flag=True, help="Return when the layer is hashed, not as soon as it can be used.")
@click.option("--to", "destination", metavar="DIR", type=arguments.path, help="Copy to a directory; must not exist.")
@click.option("--upper", metavar="DIR", type=arguments.path, help="An upper that is not mounted.")
@click.option("--lower", metavar="DIR", multiple=True, type=arguments.path, help="Its layers, top first.")
@click.option("--work", metavar="DIR", type=arguments.path, help="Its work directory [UPPER.work].")
@storage.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def commit(
    target: bytes | None,
    image: str | None,
    message: str,
    author: str | None,
    allow_empty: bool,
    wait: bool,
    destination: bytes | None,
    upper: bytes | None,
    lower: tuple[bytes, ...],
    work: bytes | None,
    store: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the changes in MNT, or in an upper that is not mounted, a new layer, and print what it is called.

    A mount of an image and a workspace get it in the store, without a copy: its id is printed as soon as it can be
    used. On a terminal the hashing that follows is shown; it goes on in the background when that is interrupted.
    With --to it is a copy, and what is printed is the path DIR.
    """
    source = _Source(target, upper, lower, work)
    _check(source)
    if destination is None:
        wish = _Wish(image, message, storage.author() if author is None else author, allow_empty, wait, store)
        _into_store(source, wish, as_json, quiet)
        return
    if image is not None or message or author is not None or allow_empty or wait or store is not None:
        raise UsageError("-t, -m, --author, --allow-empty, --wait and --store mean a store; leave them out with --to")
    place = os.path.join(os.getcwdb(), destination)
    _show(_commit_mount(target, place, quiet) if target is not None else _commit_upper(source, place, quiet), as_json)


class _Source(NamedTuple):
    """What is to be committed: a mount or a workspace, or an upper of the user's own."""

    target: bytes | None
    upper: bytes | None
    lower: tuple[bytes, ...]
    work: bytes | None


class _Wish(NamedTuple):
    """What is asked of the store."""

    image: str | None
    message: str
    author: str
    allow_empty: bool
    wait: bool
    store: bytes | None


def _check(source: _Source) -> None:
    if (source.target is None) == (source.upper is None):
        raise UsageError("give either a mount point or --upper with its --lower; see 'overlayfs commit --help'")
    if source.target is not None and (source.lower or source.work):
        raise UsageError("--lower and --work describe an unmounted upper; leave them out with a mount point")
    if source.upper is not None and not source.lower:
        raise UsageError("--upper needs the layers it lies on; name them with --lower, top first")


# --- a mounted image --------------------------------------------------------------------------------------


def _commit_mounted_image(mountpoint: bytes, wish: _Wish, as_json: bool, quiet: bool) -> None:
    from overlayfs.mount import control

    made = dict(
        control.request(
            mountpoint,
            "commit-image",
            image=wish.image,
            message=wish.message,
            author=wish.author,
            allow_empty=wish.allow_empty,
        )
    )
    _show_image(mountpoint, made, as_json, wish.wait, quiet)


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
    from overlayfs.mount import mounts

    try:
        yield
    except InUseError as error:
        raise UserError(str(mounts.name_holder(error))) from None
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


def _commit_upper(source: _Source, place: bytes, quiet: bool) -> dict[str, object]:
    from overlayfs.fs.config import StackConfig
    from overlayfs.store.copy_upper import commit_unmounted

    assert source.upper is not None
    scratch = contextlib.nullcontext(source.work) if source.work else default_workdir(source.upper)
    with _no_mount_meant(), scratch as work, progress.line(quiet) as show:
        told = commit_unmounted(
            StackConfig(source.lower, source.upper, work),
            place,
            lambda entries, size: show(f"{entries} entries, {size >> 20} MiB"),
        )
    return {"layer": output.json_text(place), "entries": told.entries, "size": told.size}


# --- into the store ---------------------------------------------------------------------------------------


def _into_store(source: _Source, wish: _Wish, as_json: bool, quiet: bool) -> None:
    if source.target is not None and _is_mount(source.target) and _is_of_image(source.target):
        if wish.store is not None:
            raise UsageError("a mount of an image knows its store; leave --store out")
        _commit_mounted_image(source.target, wish, as_json, quiet)
        return
    made = _copy_or_take(source, wish, quiet)
    if as_json:
        output.show_json(made)
    else:
        click.echo(str(made["layer"]))


def _is_mount(target: bytes) -> bool:
    """Return whether a word names a mount, not a workspace: a workspace's name is no path."""
    return b"/" in target or os.path.isdir(target)


def _is_of_image(mountpoint: bytes) -> bool:
    from overlayfs.mount import mounts

    return mounts.find(mountpoint).workspace is not None


def _copy_or_take(source: _Source, wish: _Wish, quiet: bool) -> dict[str, object]:
    from overlayfs.store.commit import CommitRequest
    from overlayfs.store.records import printable

    words = CommitRequest(
        image=wish.image, message=printable(wish.message), author=wish.author, allow_empty=wish.allow_empty
    )
    with storage.opened(wish.store) as store:
        if source.upper is not None:
            made = _copy_into_store(store, source, words, quiet)
        elif source.target is not None and _is_mount(source.target):
            made = _copy_mount(store, source.target, words, quiet)
        else:
            assert source.target is not None
            made = _commit_workspace(store, os.fsdecode(source.target), words, quiet)
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


def _commit_workspace(store: "Store", name: str, wish: "CommitRequest", quiet: bool) -> "Layer":
    from overlayfs.mount import mounts
    from overlayfs.store import commit
    from overlayfs.store.workspaces import WorkspaceInUseError

    try:
        with _no_mount_meant():
            layer = commit.commit_workspace(store, name, wish)
    except WorkspaceInUseError as error:
        raise mounts.name_workspace_holder(error) from None
    with progress.line(quiet) as show:
        return commit.hash_layer(store, layer, _counted(show, "hashing"))


def _copy_mount(store: "Store", mountpoint: bytes, wish: "CommitRequest", quiet: bool) -> "Layer":
    from overlayfs.mount import copies

    with progress.waiting("committing", quiet):
        return copies.commit_copy(store, mountpoint, wish)


def _copy_into_store(store: "Store", source: _Source, wish: "CommitRequest", quiet: bool) -> "Layer":
    from overlayfs.fs.config import StackConfig
    from overlayfs.store import commit

    if wish.image is None:
        raise UsageError("an upper of your own needs -t IMAGE: nothing else would name its layer in the store")
    assert source.upper is not None
    below = [store.layer_of_tree(path) for path in source.lower]
    place = contextlib.nullcontext(source.work) if source.work else default_workdir(source.upper)
    with _no_mount_meant(), place as work, progress.line(quiet) as show:
        config = StackConfig(source.lower, source.upper, work)
        return commit.commit_upper(store, config, below, wish, _counted(show, "copying"))


def _counted(show: progress.Show, doing: str) -> Callable[[int, int], None]:
    return lambda entries, size: show(f"{doing} {entries} entries, {size >> 20} MiB")
