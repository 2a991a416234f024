"""LiveCommits into a store of mounts that are not of its images: the layer is a copy, and the mount keeps its upper.

Who mounts directories by their names says with every mount what its layers are. If a commit moved the upper away, the
next mount of the same directories would show less than this one does.
"""

import os

import msgspec

from overlayfs import sysio
from overlayfs.errors import UsageError
from overlayfs.mount import control, mounts
from overlayfs.store import commit, layout
from overlayfs.store.commit import CommitRequest
from overlayfs.store.layers import Layer
from overlayfs.store.manifest import Manifest
from overlayfs.store.store import LayerStore

_COPY = b"copy"
_ROOT_ALONE = 1  # entries of a layer that changes nothing


def commit_copy(store: LayerStore, mountpoint: bytes, wish: CommitRequest) -> Layer:
    """Copy the upper of a mount, held still meanwhile, into a layer over those of `store` that it is mounted over.

    Puts the image that is asked for. UserError when a layer of the mount is not the store's, or nothing was changed.
    """
    if wish.image is None:
        raise UsageError("a mount of directories needs -t IMAGE: nothing else would name its layer in the store")
    below = [store.layer_of_tree(path) for path in mounts.find(mountpoint).lower]
    image = commit.on_top(wish.image, below, None, wish)
    with store.new_layer() as staged:
        copy = os.path.join(os.path.dirname(staged.tree_path), _COPY)
        made = control.request(mountpoint, "commit", destination=os.fsdecode(copy))
        if made["entries"] <= _ROOT_ALONE and not wish.allow_empty:
            raise commit.NothingToCommitError("the mount")
        os.rename(copy, staged.tree_path)  # over the empty directory that was made for it
        tree = os.open(staged.tree_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Manifest.build(tree, temp_dir=store.directory.subdirectories[layout.STAGING]) as manifest:
                layer = staged.publish(
                    manifest=manifest,
                    author=wish.author,
                    message=wish.message,
                    below=tuple(each.id for each in below),
                )
        finally:
            sysio.close(tree)
    store.put_image(msgspec.structs.replace(image, layers=(layer.id, *image.layers)))
    return layer
