"""The filesystem's verbs, synchronous and without FUSE: nodes, handles, look-up, files, names, attributes."""
