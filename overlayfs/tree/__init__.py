"""Layers as objects: what one directory tree holds, how it is read, and how the writable one is changed.

`layer` reads a tree, `upper` also writes it through `workdir`, `copyup` brings an object from one to the other.
Nothing here knows how layers are merged; nothing here knows nodes, handles or FUSE.
"""
