"""The tests of overlayfs; a package, so that every folder can import `tests.support`."""
