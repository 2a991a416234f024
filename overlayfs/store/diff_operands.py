"""The operands of a diff: workspaces, images and layers of a store, as the trees that `compare` takes."""

import os
from contextlib import ExitStack

from overlayfs.store.compare import Tree
from overlayfs.store.layers import Layer
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

_INDEX = b"index"


def named(store: LayerStore, given: str) -> Tree:
    """Return the tree of a workspace, an image or a layer; raises UserError if there is nothing of that name."""
    workspace = store.workspaces.get(given)
    return of_layers(store.stack_of(given)) if workspace is None else of_workspace(store, workspace)


def pair(store: LayerStore, before: str | None, after: str) -> tuple[Tree, Tree]:
    """Return the two trees to compare; `before` None means `after` without its topmost layer."""
    second = named(store, after)
    return (without_top(second) if before is None else named(store, before)), second


def hold(store: LayerStore, *given: str) -> ExitStack:
    """Hold the layers of these workspaces, images or layers until the returned context is left."""
    with ExitStack() as locks:
        for name in given:
            for layer in store.stack_of(name):
                locks.enter_context(layer.hold())
        return locks.pop_all()


def of_layers(stack: tuple[Layer, ...]) -> Tree:
    """Return the tree that layers show, top first."""
    return Tree(tuple(layer.tree_path for layer in stack), _without_redirects(stack, first=0))


def of_workspace(store: LayerStore, workspace: Workspace) -> Tree:
    """Return the tree that a workspace shows; of a mounted one, as far as its changes are on disk."""
    below = store.present(workspace.record.layers)
    lower = tuple(layer.tree_path for layer in below)
    return of_upper(workspace.upper_path, workspace.work_path, lower, _without_redirects(below, first=1))


def of_upper(upper: bytes, work: bytes, lower: tuple[bytes, ...], plain: frozenset[int] = frozenset()) -> Tree:
    """Return the tree that an upper shows over layers, top first; `plain` as in `Tree`."""
    return Tree((upper, *lower), plain, os.path.join(work, _INDEX))


def without_top(tree: Tree) -> Tree:
    """Return the tree without its topmost layer."""
    return Tree(tree.layers[1:], frozenset(number - 1 for number in tree.plain if number > 0))


def _without_redirects(stack: tuple[Layer, ...], first: int) -> frozenset[int]:
    """Return the positions of the layers whose manifests have no redirect; the first layer has the position `first`."""
    return frozenset(
        number
        for number, layer in enumerate(stack, first)
        if layer.record.state == "complete" and "redirect" not in layer.record.flags
    )
