"""`overlayfs umount`: unmounts."""

import os

import click

from overlayfs.errors import MountError, UserError
from overlayfs_cli import arguments
from overlayfs_cli.command import command
from overlayfs_cli.main import complain


@command(
    "End mounts.",
    """
    overlayfs umount /mnt /srv/tree
    """,
)
@click.argument("mountpoints", metavar="MNT...", nargs=-1, required=True, type=arguments.mountpoint)
@click.option(
    "-l", "--lazy", is_flag=True, help="Take a mount in use out of the tree at once; do not wait for its daemon."
)
def umount(mountpoints: tuple[bytes, ...], lazy: bool) -> int:
    """Unmount each MNT; its upper is unlocked, and free for the next mount, when the command returns."""
    return max(_unmount(mountpoint, lazy) for mountpoint in mountpoints)


def _unmount(mountpoint: bytes, lazy: bool) -> int:
    """Unmount one; return its exit code. A failure is reported, and the others are unmounted all the same."""
    from overlayfs.mount.unmount import unmount

    try:
        unmount(mountpoint, lazy=lazy)
    except UserError as error:
        complain(str(error))
    except OSError as error:
        complain(f"cannot unmount {os.fsdecode(mountpoint)}: {error.strerror}")
    else:
        return 0
    return MountError.exit_code
