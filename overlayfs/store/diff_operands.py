"""What can be compared in a store, as the layers that make it up."""

import os
from contextlib import ExitStack

from overlayfs.store.compare import Tree
from overlayfs.store.layers import Layer
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

_INDEX = b"index"


def of_layers(stack: tuple[Layer, ...]) -> Tree:
    """Return the tree that layers show, top first."""
    return Tree(tuple(layer.tree_path for layer in stack), _plain(stack, first=0))


def of_workspace(store: LayerStore, workspace: Workspace) -> Tree:
    """Return the tree that a workspace shows; while it is mounted, as far as its changes are on the disk."""
    below = store.stack_of(workspace.name)
    return over(workspace.upper_path, workspace.work_path, tuple(layer.tree_path for layer in below), _plain(below, 1))


def over(upper: bytes, work: bytes, lower: tuple[bytes, ...], plain: frozenset[int] = frozenset()) -> Tree:
    """Return the tree that an upper shows over layers."""
    return Tree((upper, *lower), plain, os.path.join(work, _INDEX))


def plain_directories(layers: tuple[bytes, ...]) -> Tree:
    """Return the tree that directories show, top first, of which nothing more is known."""
    return Tree(layers)


def _plain(stack: tuple[Layer, ...], first: int) -> frozenset[int]:
    """Return the positions of layers without redirects, as their manifests tell; the first one has number `first`."""
    return frozenset(
        number
        for number, layer in enumerate(stack, first)
        if layer.record.state == "complete" and "redirect" not in layer.record.flags
    )


def named(store: LayerStore, given: str) -> Tree:
    """Return the tree of a workspace, an image or a layer; UserError for none of these."""
    workspace = store.find_workspace(given)
    return of_layers(store.stack_of(given)) if workspace is None else of_workspace(store, workspace)


def below(tree: Tree) -> Tree:
    """Return the tree without its topmost layer."""
    return Tree(tree.layers[1:], frozenset(number - 1 for number in tree.plain if number > 0))


def pair(store: LayerStore, before: str | None, after: str) -> tuple[Tree, Tree]:
    """Return two trees to be compared; `before` None is what lies below the top of `after`."""
    second = named(store, after)
    return (below(second) if before is None else named(store, before)), second


def hold(store: LayerStore, *given: str) -> ExitStack:
    """Keep the layers that these names stand for as they are until the context ends."""
    with ExitStack() as held:
        for name in given:
            for layer in store.stack_of(name):
                held.enter_context(layer.hold())
        return held.pop_all()
