"""Engines: they turn FUSE requests into calls of `overlayfs.fs` and results into replies."""
