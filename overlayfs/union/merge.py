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


def fold(top: Mapping[bytes, Kind], below: Mapping[bytes, tuple[int, ...]]) -> dict[bytes, tuple[int, ...]]:
    """Return what `merge` would make of one more listing over those that `below` was made of.

    The names are the same and in the same order. Where `top` holds a directory, positions of a file below it may
    follow, because `below` does not tell one from a directory: a walk down the positions stops at it.
    """
    found: dict[bytes, tuple[int, ...]] = {}
    for name, kind in top.items():
        if kind is Kind.DIR:
            found[name] = (0, *(position + 1 for position in below.get(name, ())))
        elif kind not in (Kind.WHITEOUT, Kind.ABSENT):
            found[name] = (0,)
    for name, positions in below.items():
        if top.get(name, Kind.ABSENT) is Kind.ABSENT:
            found[name] = tuple(position + 1 for position in positions)
    return found
