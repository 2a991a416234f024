"""Whether a tree found after a power cut keeps the contract: C2 of docs/reliability.md.

What was made durable is there; the rest is old or new, each file for itself, and never a content that neither had; no
object that had a name throughout has lost it, and none has one too many.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from overlayfs import Overlay, StackConfig
from tests.crash.harness import ROOT, View, view
from tests.crash.power.history import MARK, Promises, Reference, Snapshot, Thing

BLOCK = 4096


def look(config: StackConfig, directory: bytes) -> View:
    """Mount a stack in this process, look at one of its directories, and check that it can be changed."""
    overlay = Overlay(config)
    try:
        top = overlay.resolve(directory)
        found = view(overlay, top)
        _, handle = overlay.create(top, b"probe", 0o600, os.O_RDWR, ROOT)
        overlay.files.release(handle)
        overlay.names.unlink(top, b"probe")
        return found
    finally:
        overlay.close()


def found_things(shown: View) -> dict[str, Thing]:
    """Return what a view shows, by path; entries are left out."""
    return {os.fsdecode(path).strip("/"): _thing(facts) for path, facts in shown.items()}


def _thing(facts: tuple[object, ...]) -> Thing:
    mode, _uid, _gid, _rdev, attributes, *rest = facts
    assert isinstance(mode, int) and isinstance(attributes, tuple)
    data = rest[-1] if rest else b""
    assert isinstance(data, bytes)
    assert not stat.S_ISREG(mode) or rest[1] == len(data), f"size {rest[1]}, but {len(data)} bytes to read"
    return Thing(stat.S_IFMT(mode), stat.S_IMODE(mode), dict(attributes).get(MARK.encode()), data)


@dataclass
class Judge:
    """Judges what was found when `done` steps had returned and `begun` had been started."""

    reference: Reference
    done: int
    begun: int

    def __post_init__(self) -> None:
        self._promises = Promises()
        self._promises.keep(self.reference, self.done)
        self._seen: Counter[int] = Counter()

    def violations(self, found: dict[str, Thing]) -> list[str]:
        """Return a line for each rule that is broken."""
        self._found = found
        if "" not in found:
            return ["the directory of the load is gone"]
        lines = list(self._directory(self.reference.snapshots[0].root, ""))
        return lines or list(self._counts())

    def _trees(self, since: int) -> list[Snapshot]:
        return self.reference.snapshots[since : self.begun + 1]

    def _directory(self, number: int, path: str) -> Iterator[str]:
        trees = [tree for tree in self._trees(0) if number in tree.things]
        prefix = f"{path}/" if path else ""
        expected = {name for tree in trees for name in tree.things[number].entries}
        shown = {each[len(prefix) :] for each in self._found if each.startswith(prefix) and each != path}
        for name in sorted(expected | {name for name in shown if "/" not in name}):
            yield from self._name(number, name, prefix + name)

    def _name(self, directory: int, name: str, path: str) -> Iterator[str]:
        since = self._promises.names.get((directory, name), 0)
        trees = [tree for tree in self._trees(since) if directory in tree.things]
        allowed = dict.fromkeys(tree.things[directory].entries.get(name) for tree in trees)
        thing = self._found.get(path)
        if thing is None:
            if None not in allowed:
                yield f"{path} is lost"
            return
        yield from self._one_of([number for number in allowed if number is not None], thing, path)

    def _one_of(self, candidates: list[int], thing: Thing, path: str) -> list[str]:
        """Return why the object at a path is none of these; directories are distinguished by their content."""
        lines = [f"{path}: nothing should be there"]
        for number in candidates:
            before = self._seen.copy()
            reason = self._differs(number, thing)
            lines = [f"{path}: {reason}"] if reason else []
            if not lines and thing.kind == stat.S_IFDIR:
                lines = list(self._directory(number, path))
            if not lines:
                self._seen[number] += 1
                break
            self._seen = before
        return lines

    def _differs(self, number: int, found: Thing) -> str | None:
        """Return why what was found is not this object, None if it may be."""
        metas = self._states(number, self._promises.meta)
        datas = self._states(number, self._promises.data)
        if found.kind != metas[-1].kind:
            return "of another type"
        if found.mode not in {thing.mode for thing in metas}:
            return f"mode {found.mode:o} instead of {' or '.join(sorted({f'{thing.mode:o}' for thing in metas}))}"
        if found.mark not in {thing.mark for thing in metas}:
            return f"attribute {found.mark!r} instead of {metas[-1].mark!r}"
        return _content_differs(found.data, [thing.data for thing in datas])

    def _states(self, number: int, since: dict[int, int]) -> list[Thing]:
        first = since.get(number, 0)
        states = [tree.things[number] for tree in self._trees(first) if number in tree.things]
        return states or [tree.things[number] for tree in self._trees(0) if number in tree.things]

    def _counts(self) -> Iterator[str]:
        """An object that had a name throughout still has one, and none has more names than it ever had."""
        names = [tree.names() for tree in self._trees(0)]
        for number in {number for tree in names for number in tree}:
            since = self._promises.lives.get(number)
            root = number == self.reference.snapshots[0].root
            named = since is not None and all(tree.get(number) for tree in names[since:])
            if named and not root and not self._seen[number]:
                yield f"{self._path(number)} has lost its name"
            if self._seen[number] > max(tree.get(number, 0) for tree in names[since or 0 :]):
                yield f"{self._path(number)} is there {self._seen[number]} times"

    def _path(self, number: int) -> str:
        names = (
            n for tree in self._trees(0) for t in tree.things.values() for n, at in t.entries.items() if at == number
        )
        return next(names, "an object")


def _content_differs(found: bytes, allowed: list[bytes]) -> str | None:
    """Each byte must be that of one of the states, and the size must be the size of one, or be on the way to it.

    A write that makes a file longer does so page by page. Where the states differ the user has written or cut, and the
    upper's file system may show zeros that were never there: ext4 makes the new size durable before the data of an
    append, and truncating fills a block with zeros before the size falls. No layer above it can prevent that.
    """
    if found in allowed:
        return None
    sizes = sorted({len(data) for data in allowed})
    if len(found) not in sizes and (len(found) % BLOCK or not sizes[0] < len(found) < sizes[-1]):
        return f"{len(found)} bytes instead of {sizes}"
    for at in range(0, len(found), BLOCK):
        piece = found[at : at + BLOCK]
        states = [data[at : at + BLOCK] for data in allowed]
        if all(state[: len(piece)] != piece for state in states) and not _is_mixed(piece, states):
            return f"at {at} content that was never there: {piece[:4]!r} of {[state[:4] for state in states]}"
    return None


def _is_mixed(piece: bytes, states: list[bytes]) -> bool:
    for at, byte in enumerate(piece):
        values = {state[at] if at < len(state) else None for state in states}
        if byte not in values and (byte or len(values) == 1):
            return False
    return True
