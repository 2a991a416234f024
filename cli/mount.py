"""`overlayfs mount`: mounts a stack of plain directories, or an image of the store."""

import dataclasses
import os
from collections.abc import Callable

import click

from overlayfs.errors import UsageError
from overlayfs.mount.options import Draft, MountOptions
from overlayfs_cli import arguments, store_option
from overlayfs_cli.command import command
from overlayfs_cli.default_workdir import default_workdir
from overlayfs_cli.main import complain


@command(
    "Mount a stack of directories, or an image.",
    """
    overlayfs mount -o lowerdir=/layers/top:/layers/base,upperdir=/data/up,workdir=/data/work /mnt
    overlayfs mount --lower /layers/top --lower /layers/base --upper /data/up /mnt
    overlayfs mount --lower /layers/top --lower /layers/base /mnt     # read-only
    overlayfs mount site:v1 /mnt --name draft                         # from the store; draft is kept
    overlayfs mount site:v1 /mnt --ephemeral                          # changes go with the mount
    """,
)
@click.argument("places", metavar="[IMAGE] MNT", nargs=-1, required=True, type=arguments.image_or_directory)
@click.option("-o", "options", metavar="OPTS", multiple=True, type=arguments.text, help="Options, as for mount(8).")
@click.option("--lower", metavar="DIR", multiple=True, type=arguments.path, help="A lower layer; the first is the top.")
@click.option("--upper", metavar="DIR", type=arguments.path, help="Where changes go; if left out, nothing can change.")
@click.option(
    "--work", metavar="DIR", type=arguments.path, help="Scratch directory on the upper's file system [UPPER.work]."
)
@click.option("--name", "workspace", metavar="WORKSPACE", help="Where the store keeps the changes [a new name].")
@click.option("--ephemeral", is_flag=True, help="Do not keep the changes.")
@store_option.option
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("-d", "--debug", is_flag=True, help="Log to standard error; implies -f.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say which features are off.")
def mount(
    places: tuple[str, ...],
    options: tuple[bytes, ...],
    lower: tuple[bytes, ...],
    upper: bytes | None,
    work: bytes | None,
    workspace: str | None,
    ephemeral: bool,
    store: bytes | None,
    foreground: bool,
    debug: bool,
    quiet: bool,
) -> None:
    """Mount a stack of directories, or IMAGE, at MNT and return when it answers."""
    image, mountpoint = _split(places)
    draft = Draft(mount={"allow_other": os.geteuid() == 0})
    for text in options:
        draft.read(text)
    _add_flags(draft, lower, upper, work)
    _refuse_unknown(draft)
    if foreground or debug:
        draft.mount.update(foreground=True, debug=debug or draft.mount.get("debug", False))
    notify = _silent if quiet else _note
    for name in draft.ignored:
        notify(f"option {name} has no effect here")
    if image is not None:
        _refuse_directories(draft)
        _mount_image(draft, image, workspace, ephemeral, store, mountpoint, notify)
        return
    if workspace is not None or ephemeral or store is not None:
        raise UsageError("--name, --ephemeral and --store belong to a mount of an image; see 'overlayfs mount --help'")
    if draft.upper is None or draft.work is not None:
        _start(draft.build(), mountpoint, notify)
        return
    with default_workdir(draft.upper) as draft.work:
        _start(draft.build(), mountpoint, notify)


def _split(places: tuple[str, ...]) -> tuple[str | None, bytes]:
    """Return the image, None if only a mount point is given, and the mount point."""
    if len(places) > 2:
        raise UsageError(f"too many arguments: {' '.join(places[2:])}; see 'overlayfs mount --help'")
    *image, mountpoint = places
    return (image[0] if image else None), arguments.path_bytes(mountpoint)


def _refuse_directories(draft: Draft) -> None:
    if draft.lower or draft.upper or draft.work:
        raise UsageError("an image brings its own layers, upper and work directory; leave yours out")


def _mount_image(
    draft: Draft,
    image: str,
    workspace: str | None,
    ephemeral: bool,
    store: bytes | None,
    mountpoint: bytes,
    notify: Callable[[str], None],
) -> None:
    """Mount an image, and print the name of its workspace if that was generated."""
    from overlayfs.mount import image_mount

    may_create = store is None and store_option.VARIABLE not in os.environ
    with image_mount.lease_workspace(store_option.path(store), image, workspace, ephemeral, may_create) as lease:
        draft.lower, draft.upper, draft.work = list(lease.lower), lease.upper, lease.work
        options = dataclasses.replace(draft.build(), image_mount=lease.image_mount)
        if lease.behind:
            notify(f"workspace {workspace} keeps the layers that {image} had when it was created")
        is_generated = workspace is None and not ephemeral
        if is_generated and options.foreground:
            click.echo(lease.image_mount.workspace)
        _start(options, mountpoint, notify)
        if is_generated and not options.foreground:
            click.echo(lease.image_mount.workspace)


def _start(options: MountOptions, mountpoint: bytes, notify: Callable[[str], None]) -> None:
    from overlayfs.mount import start

    start.mount(options, mountpoint, notify)


def _silent(notice: str) -> None:
    """Print no notice."""


def _note(notice: str) -> None:
    complain(f"note: {notice}")


def _add_flags(draft: Draft, lower: tuple[bytes, ...], upper: bytes | None, work: bytes | None) -> None:
    """Add --lower, --upper and --work to the draft. UsageError if -o has set the same."""
    for flag, option, given, known in (
        ("--lower", "lowerdir", lower, draft.lower),
        ("--upper", "upperdir", upper, draft.upper),
        ("--work", "workdir", work, draft.work),
    ):
        if given and known:
            raise UsageError(f"both {flag} and -o {option} are given; use one of them")
    draft.lower = draft.lower or list(lower)
    draft.upper = draft.upper or upper
    draft.work = draft.work or work


def _refuse_unknown(draft: Draft) -> None:
    if draft.unknown:
        plural = "s" if len(draft.unknown) > 1 else ""
        raise UsageError(f"unknown option{plural} {', '.join(draft.unknown)} in -o; see 'overlayfs mount --help'")
