"""A mount in the foreground that has a bug: `python -m tests.support.mutants NAME OPTIONS MOUNTPOINT`."""

import sys

from tests.support import foreground
from tests.support.mutants import seeded


def main(name: str, options: str, mountpoint: str) -> int:
    """Mount until the end of the mount."""
    with seeded(name):
        return foreground.mount(options, mountpoint)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
