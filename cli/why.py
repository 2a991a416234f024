"""`overlayfs why`: shows which layer a path comes from, and what it hides."""

import os

import click

from overlayfs.errors import UserError
from overlayfs_cli import arguments, output
from overlayfs_cli.command import command


@command(
    "Show which layer gives a path.",
    """
    overlayfs why /mnt etc/hosts
    overlayfs why /mnt /mnt/etc/hosts --json
    """,
)
@click.argument("mountpoint", metavar="MNT", type=arguments.mountpoint)
@click.argument("path", metavar="PATH", type=arguments.path)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def why(mountpoint: bytes, path: bytes, as_json: bool) -> None:
    """Show what each layer of MNT holds under PATH, top first: what is seen, and what that hides.

    PATH counts from the root of the mount; one that begins with MNT itself is understood too.
    """
    from overlayfs.mount import control_client

    inside = within(mountpoint, path)
    found = control_client.Client.at(mountpoint).why(inside)
    if not found:
        raise UserError(f"no layer of {os.fsdecode(mountpoint)} holds {os.fsdecode(inside)}")
    if as_json:
        layers = [{"layer": each.layer, "kind": each.kind, "role": each.role} for each in found]
        output.show_json({"path": os.fsdecode(inside), "layers": layers})
    else:
        rows = [(output.path_text(os.fsencode(each.layer)), each.kind, each.role) for each in found]
        output.show_table(("LAYER", "KIND", "ROLE"), rows)


def within(mountpoint: bytes, path: bytes) -> bytes:
    """Return the path counted from the root of the mount, with a slash in front."""
    root = mountpoint.rstrip(b"/")
    if root and (path + b"/").startswith(root + b"/"):
        path = path[len(root) :]
    return b"/" + path.strip(b"/")
