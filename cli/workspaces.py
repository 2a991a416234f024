"""`overlayfs workspaces`: lists the workspaces of the store."""

from typing import TYPE_CHECKING

import click

from overlayfs_cli import output, store_option
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.store.workspaces import Workspace

HEADINGS = ("WORKSPACE", "IMAGE", "CREATED", "KEPT", "MOUNTED")


@command(
    "List the workspaces of the store.",
    """
    overlayfs workspaces
    overlayfs workspaces --json
    """,
)
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the names.")
def workspaces(store: bytes | None, as_json: bool, quiet: bool) -> None:
    """List workspaces, the images they belong to, and where they are mounted."""
    with store_option.opened(store) as opened:
        found = list(opened.workspaces())
    mounted = {} if quiet else _mount_points()
    output.show_list(
        "workspaces",
        documents=(_document(workspace, mounted.get(workspace.upper_path)) for workspace in found),
        names=(workspace.name for workspace in found),
        headings=HEADINGS,
        rows=(_row(workspace, mounted.get(workspace.upper_path)) for workspace in found),
        as_json=as_json,
        quiet=quiet,
    )


def _mount_points() -> dict[bytes, bytes]:
    """Return the mount point of each mounted upper."""
    from overlayfs.mount import mounts

    return {mount.upper: mount.mountpoint for mount in mounts.list_mounts() if mount.upper is not None}


def _document(workspace: "Workspace", mountpoint: bytes | None) -> dict[str, object]:
    record = workspace.record
    return {
        "name": record.name,
        "image": record.image,
        "layers": list(record.layers),
        "created": record.created,
        "ephemeral": record.ephemeral,
        "mountpoint": output.json_text(mountpoint),
        "path": output.json_text(workspace.path),
    }


def _row(workspace: "Workspace", mountpoint: bytes | None) -> tuple[str, ...]:
    record = workspace.record
    return (
        record.name,
        record.image,
        output.time_text(record.created),
        "no" if record.ephemeral else "yes",
        "-" if mountpoint is None else output.path_text(mountpoint),
    )
