"""`overlayfs mount`: a stack of plain directories becomes a mount."""

import os
from collections.abc import Callable

import click

from overlayfs.errors import UsageError
from overlayfs.mount.options import Draft, MountOptions
from overlayfs_cli import arguments
from overlayfs_cli.command import command
from overlayfs_cli.main import complain
from overlayfs_cli.workplace import work_beside


@command(
    "Mount a stack of directories.",
    """
    overlayfs mount -o lowerdir=/layers/top:/layers/base,upperdir=/data/up,workdir=/data/work /mnt
    overlayfs mount --lower /layers/top --lower /layers/base --upper /data/up /mnt
    overlayfs mount --lower /layers/top --lower /layers/base /mnt     # read-only
    """,
)
@click.argument("mountpoint", metavar="MNT", type=arguments.path)
@click.option("-o", "options", metavar="OPTS", multiple=True, type=arguments.text, help="Options, as for mount(8).")
@click.option("--lower", metavar="DIR", multiple=True, type=arguments.path, help="A layer; the first one lies on top.")
@click.option("--upper", metavar="DIR", type=arguments.path, help="Where changes go; if left out, nothing can change.")
@click.option(
    "--work", metavar="DIR", type=arguments.path, help="Scratch directory on the upper's file system [UPPER.work]."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("-d", "--debug", is_flag=True, help="Log to standard error; implies -f.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say which features are off.")
def mount(
    mountpoint: bytes,
    options: tuple[bytes, ...],
    lower: tuple[bytes, ...],
    upper: bytes | None,
    work: bytes | None,
    foreground: bool,
    debug: bool,
    quiet: bool,
) -> None:
    """Mount a stack of directories at MNT and return when it answers."""
    draft = Draft(mount={"allow_other": os.geteuid() == 0})
    for text in options:
        draft.read(text)
    _add_flags(draft, lower, upper, work)
    _refuse_unknown(draft)
    if foreground or debug:
        draft.mount.update(foreground=True, debug=debug or draft.mount.get("debug", False))
    notify = _silent if quiet else _note
    for name in draft.idle:
        notify(f"option {name} has no effect here")
    if draft.upper is None or draft.work is not None:
        _start(draft.build(), mountpoint, notify)
        return
    with work_beside(draft.upper) as draft.work:
        _start(draft.build(), mountpoint, notify)


def _start(options: MountOptions, mountpoint: bytes, notify: Callable[[str], None]) -> None:
    from overlayfs.mount import life

    life.mount(options, mountpoint, notify)


def _silent(notice: str) -> None:
    """Say nothing."""


def _note(notice: str) -> None:
    complain(f"note: {notice}")


def _add_flags(draft: Draft, lower: tuple[bytes, ...], upper: bytes | None, work: bytes | None) -> None:
    """Put --lower, --upper and --work into the draft; UsageError if -o has said the same differently."""
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
