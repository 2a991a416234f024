"""`overlayfs commit`: makes the changes in an upper a layer."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from overlayfs.errors import InUseError, MountError, UsageError, UserError
from overlayfs_cli import arguments, output, progress, store_option
from overlayfs_cli.command import command
from overlayfs_cli.default_workdir import default_workdir

_POLL = 0.1  # seconds between two requests for the progress of the hashing

if TYPE_CHECKING:
    from overlayfs import Store
    from overlayfs.mount.control_client import Client
    from overlayfs.mount.control_protocol import CommitImage, HashingReply
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
@click.argument("target", metavar="[MNT|WORKSPACE]", required=False, type=arguments.mountpoint_or_workspace)
@click.option("-t", "--tag", "image", metavar="IMAGE", help="The image that the new layer becomes the top of.")
@click.option("-m", "--message", metavar="TEXT", default="", help="What the layer's record says of it.")
@click.option("--author", metavar="NAME", help="Who made it [the user].")
@click.option("--allow-empty", is_flag=True, help="Make a layer even if nothing has changed.")
@click.option("--wait", is_flag=True, help="Return when the layer is hashed, not as soon as it can be used.")
@click.option("--to", "destination", metavar="DIR", type=arguments.path, help="Copy to a directory; must not exist.")
@click.option("--upper", metavar="DIR", type=arguments.path, help="An upper that is not mounted.")
@click.option("--lower", metavar="DIR", multiple=True, type=arguments.path, help="Its layers, top first.")
@click.option("--work", metavar="DIR", type=arguments.path, help="Its work directory [UPPER.work].")
@store_option.option
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
        _commit_to_store(source, image, message, author, allow_empty, wait, store, as_json, quiet)
        return
    if image is not None or message or author is not None or allow_empty or wait or store is not None:
        raise UsageError("-t, -m, --author, --allow-empty, --wait and --store mean a store; leave them out with --to")
    _commit_to_directory(source, os.path.join(os.getcwdb(), destination), as_json, quiet)


class _Source(NamedTuple):
    """What is committed: a mount or a workspace, or an upper of the user's own that is not mounted."""

    target: bytes | None
    upper: bytes | None
    lower: tuple[bytes, ...]
    work: bytes | None


def _check(source: _Source) -> None:
    if (source.target is None) == (source.upper is None):
        raise UsageError("give either a mount point or --upper with its --lower; see 'overlayfs commit --help'")
    if source.target is not None and (source.lower or source.work):
        raise UsageError("--lower and --work describe an unmounted upper; leave them out with a mount point")
    if source.upper is not None and not source.lower:
        raise UsageError("--upper needs its lower layers; name them with --lower, top first")


def _client(source: _Source) -> "Client | None":
    """Return the client of the mount that is to be committed; None for a workspace, whose name is no path."""
    from overlayfs.mount.control_client import Client

    if source.target is None or not (b"/" in source.target or os.path.isdir(source.target)):
        return None
    return Client.at(source.target)


# --- to a directory ---------------------------------------------------------------------------------------


def _commit_to_directory(source: _Source, destination: bytes, as_json: bool, quiet: bool) -> None:
    """Copy the upper to a new directory, and print its path."""
    from overlayfs.mount.control_client import Client

    if source.target is not None:
        with progress.waiting("committing", quiet):
            made = Client.at(source.target).commit(destination)
        entries, size = made.entries, made.size
    else:
        entries, size = _copy_unmounted(source, destination, quiet)
    if as_json:
        output.show_json({"layer": output.json_text(destination), "entries": entries, "size": size})
    else:
        click.echo(output.path_text(destination))


def _copy_unmounted(source: _Source, destination: bytes, quiet: bool) -> tuple[int, int]:
    from overlayfs.fs.config import StackConfig
    from overlayfs.store.copy_upper import commit_unmounted

    with _workdir(source) as work, progress.line(quiet) as show:
        config = StackConfig(source.lower, source.upper, work)
        copied = commit_unmounted(
            config, destination, lambda entries, size: show(f"{entries} entries, {size >> 20} MiB")
        )
    return copied.entries, copied.size


@contextlib.contextmanager
def _workdir(source: _Source) -> Iterator[bytes]:
    """Give the work directory of an upper that is not mounted; failures inside have the exit code of a commit."""
    assert source.upper is not None
    directory = contextlib.nullcontext(source.work) if source.work else default_workdir(source.upper)
    with _failures_of_a_commit(), directory as work:
        yield work


@contextlib.contextmanager
def _failures_of_a_commit() -> Iterator[None]:
    """Give the failure to open a stack the exit code 1: `MountError` has the one of a failed mount."""
    from overlayfs.mount import mounts

    try:
        yield
    except InUseError as error:
        raise UserError(str(mounts.name_holder(error))) from None
    except MountError as error:
        raise UserError(str(error)) from None


# --- to a store -------------------------------------------------------------------------------------------


def _commit_to_store(
    source: _Source,
    image: str | None,
    message: str,
    author: str | None,
    allow_empty: bool,
    wait: bool,
    store: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from overlayfs.mount.control_protocol import CommitImage

    author = store_option.author() if author is None else author
    request = CommitImage(image=image, message=message, author=author, allow_empty=allow_empty)
    client = _client(source)
    if client is not None and client.mount.workspace is not None:
        if store is not None:
            raise UsageError("a mount of an image knows its store; leave --store out")
        _commit_mounted_image(client, request, as_json, wait, quiet)
        return
    with store_option.opened(store) as opened:
        layer = _commit_in_store(opened, source, client, _for_store(request), quiet)
        name = None if image is None else opened.images.find(image).name
    if as_json:
        output.show_json(_document(layer, name))
    else:
        click.echo(layer.record.id)


def _commit_mounted_image(client: "Client", request: "CommitImage", as_json: bool, wait: bool, quiet: bool) -> None:
    """Print the id at once and the hashing meanwhile; a JSON document is printed when there is nothing to wait for."""
    from overlayfs.mount.control_protocol import HashingReply

    made = client.commit_image(request)
    if not as_json:
        click.echo(made.layer)
    hashing = HashingReply(state="hashing")
    if wait:
        hashing = _follow(client, made.layer, quiet)
    elif not quiet and not as_json and sys.stderr.isatty():
        with contextlib.suppress(KeyboardInterrupt):
            hashing = _follow(client, made.layer, quiet)
    if as_json:
        state, digest = ("complete", hashing.told) if hashing.state == "done" else (hashing.state, None)
        document = {"layer": made.layer, "image": made.image, "held": made.held, "state": state, "digest": digest}
        output.show_json(document)
    if hashing.state == "failed":
        raise UserError(f"layer {made.layer} is made, but it could not be hashed: {hashing.told}")


def _follow(client: "Client", layer: str, quiet: bool) -> "HashingReply":
    """Show the progress of the hashing until it ends."""
    with progress.line(quiet) as show:
        while (found := client.hashing(layer)).state == "hashing":
            show(f"hashing: {found.entries} entries, {found.size >> 20} MiB")
            time.sleep(_POLL)
    return found


def _for_store(request: "CommitImage") -> "CommitRequest":
    from overlayfs.store.commit import CommitRequest
    from overlayfs.store.records import printable

    return CommitRequest(
        image=request.image,
        message=printable(request.message),
        author=request.author,
        allow_empty=request.allow_empty,
    )


def _commit_in_store(
    store: "Store", source: _Source, client: "Client | None", request: "CommitRequest", quiet: bool
) -> "Layer":
    if source.upper is not None:
        return _commit_upper(store, source, request, quiet)
    if client is not None:
        return _commit_mount(store, client, request, quiet)
    assert source.target is not None
    return _commit_workspace(store, os.fsdecode(source.target), request, quiet)


def _commit_upper(store: "Store", source: _Source, request: "CommitRequest", quiet: bool) -> "Layer":
    from overlayfs.fs.config import StackConfig
    from overlayfs.store import commit

    if request.image is None:
        raise UsageError("an upper of your own needs -t IMAGE: nothing else would name its layer in the store")
    below = [store.layers.of_tree(path) for path in source.lower]
    with _workdir(source) as work, progress.line(quiet) as show:
        config = StackConfig(source.lower, source.upper, work)
        return commit.commit_upper(store, config, below, request, _counted(show, "copying"))


def _commit_mount(store: "Store", client: "Client", request: "CommitRequest", quiet: bool) -> "Layer":
    from overlayfs.store import commit

    if request.image is None:
        raise UsageError("a mount of directories needs -t IMAGE: nothing else would name its layer in the store")
    below = [store.layers.of_tree(path) for path in client.mount.lower]
    with progress.waiting("committing", quiet):
        return commit.commit_mount(store, below, request, lambda destination: client.commit(destination).entries)


def _commit_workspace(store: "Store", name: str, request: "CommitRequest", quiet: bool) -> "Layer":
    from overlayfs.mount import mounts
    from overlayfs.store import commit
    from overlayfs.store.workspaces import WorkspaceInUseError

    try:
        with _failures_of_a_commit():
            layer = commit.commit_workspace(store, name, request)
    except WorkspaceInUseError as error:
        raise mounts.name_workspace_holder(error) from None
    with progress.line(quiet) as show:
        return commit.hash_layer(store, layer, _counted(show, "hashing"))


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


def _counted(show: progress.Show, verb: str) -> Callable[[int, int], None]:
    return lambda entries, size: show(f"{verb} {entries} entries, {size >> 20} MiB")
