"""`overlayfs rm`: removes images and workspaces."""

import os

import click

from overlayfs.errors import UserError
from overlayfs_cli import arguments, store_option
from overlayfs_cli.command import command
from overlayfs_cli.main import complain


@command(
    "Remove images and workspaces.",
    """
    overlayfs rm site:v1
    overlayfs rm draft        # a workspace, with all its changes
    """,
)
@click.argument("names", metavar="IMAGE|WORKSPACE...", nargs=-1, required=True, type=arguments.image_or_workspace)
@click.option("--workspace", is_flag=True, help="The names are workspaces, even if there are images of the same names.")
@store_option.option
def rm(names: tuple[str, ...], workspace: bool, store: bytes | None) -> int:
    """Remove images, or workspaces with their changes. Layers that are no longer needed are removed by gc."""
    from overlayfs.mount import mounts
    from overlayfs.store.workspaces import WorkspaceInUseError

    failed = 0
    with store_option.opened(store) as opened:
        for name in names:
            try:
                (opened.workspaces.remove if workspace else opened.remove)(name)
            except WorkspaceInUseError as error:
                complain(str(mounts.name_workspace_holder(error)))
            except UserError as error:
                complain(str(error))
            except OSError as error:
                complain(f"cannot remove {name}: {error.strerror or os.strerror(error.errno or 0)}")
            else:
                continue
            failed = 1
    return failed
