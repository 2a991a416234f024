"""Many listings, one directory: the names of a merged directory and what each is made of.

Law: a name is in ``merge(listings)`` exactly when `resolve.resolve` of it is not empty, and the positions are
the same.
"""

from collections.abc import Iterable, Mapping

from overlayfs.union.resolve import Kind


def merge(listings: Iterable[Mapping[bytes, Kind]]) -> dict[bytes, tuple[int, ...]]:
    """Return each visible name with the positions, top first, of the entries that make it up.

    `listings` is what each part of the directory holds, top first; names that a part lacks are absent there.
    The order is that of first appearance.  Each listing is read once, so they may be made one at a time.
    """
    visible: dict[bytes, list[int]] = {}
    decided: set[bytes] = set()
    for position, listing in enumerate(listings):
        for name, kind in listing.items():
            if kind is Kind.ABSENT or name in decided:
                continue
            if kind is not Kind.WHITEOUT and not (kind is Kind.FILE and name in visible):
                visible.setdefault(name, []).append(position)
            if kind is not Kind.DIR:
                decided.add(name)
    return {name: tuple(positions) for name, positions in visible.items()}
