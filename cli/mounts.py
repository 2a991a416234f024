"""`overlayfs mounts`: lists what is mounted."""

import os
from typing import TYPE_CHECKING

import click

from overlayfs_cli import output
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.mount.mounts import Mount

HEADINGS = ("MOUNTPOINT", "ENGINE", "PID", "IMAGE", "WORKSPACE", "UPPER", "LAYERS")
LAYERS_SHOWN = 3


@command(
    "List what is mounted.",
    """
    overlayfs mounts
    overlayfs mounts --json
    """,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the mount points.")
def mounts(as_json: bool, quiet: bool) -> None:
    """List the mounts of overlayfs: layers top first, upper, process and engine."""
    from overlayfs.mount import mounts

    found = mounts.list_mounts()
    output.show_list(
        "mounts",
        documents=(_document(mount) for mount in found),
        names=(output.path_text(mount.mountpoint) for mount in found),
        headings=HEADINGS,
        rows=(_row(mount) for mount in found),
        as_json=as_json,
        quiet=quiet,
    )


def _row(mount: "Mount") -> tuple[str, ...]:
    upper = "-" if mount.upper is None else output.path_text(mount.upper)
    pid = "-" if mount.pid is None else str(mount.pid)
    image, workspace = mount.image or "-", mount.workspace or "-"
    return (output.path_text(mount.mountpoint), mount.engine or "-", pid, image, workspace, upper, _layers(mount))


def _layers(mount: "Mount") -> str:
    """Return the first few layers: by path, layers of a store by the start of their ids."""
    named = [output.path_text(path) for path in mount.lower[:LAYERS_SHOWN]]
    if mount.store is not None:
        named = [output.short_id(os.path.basename(os.path.dirname(path))) for path in named]
    shown = ":".join(named)
    hidden = len(mount.lower) - LAYERS_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown or "-"


def _document(mount: "Mount") -> dict[str, object]:
    return {
        "mountpoint": output.json_text(mount.mountpoint),
        "source": output.json_text(mount.source),
        "engine": mount.engine,
        "pid": mount.pid,
        "read_only": mount.read_only,
        "lower": [output.json_text(path) for path in mount.lower],
        "upper": output.json_text(mount.upper),
        "work": output.json_text(mount.work),
        "notices": list(mount.notices),
        "image": mount.image,
        "workspace": mount.workspace,
        "store": output.json_text(mount.store),
    }
