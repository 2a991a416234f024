"""The store with everything that can be done to it: what Python programs use, and the command line with them.

    from overlayfs import Store

    with Store(b"/var/lib/overlayfs") as store:
        for image in store.images():
            print(image.name, image.layers)

Each method loads what it needs when it is called.
"""

from overlayfs.store.store import LayerStore


class Store(LayerStore):
    """A store; `LayerStore` says what opening it means and what else it can do."""
