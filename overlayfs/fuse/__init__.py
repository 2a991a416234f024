"""Engines: they turn FUSE requests into calls of `overlayfs.fs` and results into replies.

engine: what both engines share. kernel/ speaks the FUSE protocol on /dev/fuse, pyfuse3/ goes through libfuse.
"""
