"""Layers as objects: reading one directory tree, and changing the writable one.

`layer` reads a tree, `upper` also writes it through `workdir`, `staging` builds copies of lower objects.
Nothing here depends on how layers are merged, or on nodes, handles or FUSE.
"""
