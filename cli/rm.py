"""`overlayfs rm`: names and workspaces go."""

import os

import click

from overlayfs.errors import UserError
from overlayfs_cli import arguments, storage
from overlayfs_cli.command import command
from overlayfs_cli.main import complain


@command(
    "Remove images and workspaces.",
    """
    overlayfs rm site:v1
    overlayfs rm draft        # a workspace, with all that was changed in it
    """,
)
@click.argument("names", metavar="IMAGE|WORKSPACE...", nargs=-1, required=True, type=arguments.image_or_workspace)
@click.option("--workspace", is_flag=True, help="The names are workspaces, also where images have them too.")
@storage.option
def rm(names: tuple[str, ...], workspace: bool, store: bytes | None) -> int:
    """Remove the name of an image, or a workspace with its changes; layers that nothing needs any more go by gc."""
    from overlayfs.mount import mounts
    from overlayfs.store.workspaces import WorkspaceInUseError

    failed = 0
    with storage.opened(store) as opened:
        for name in names:
            try:
                (opened.remove_workspace if workspace else opened.remove)(name)
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
