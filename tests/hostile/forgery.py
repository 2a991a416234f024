"""What no user may make, see or reach through a mount: forged marks, private xattrs, the program's own files.

Each rule is an act with its only correct result; there is nothing on ext4 to compare with.
"""

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.hostile.rights import USERS
from tests.support.outcome import errno_of, name_of
from tests.support.spec import Dir, File, Tree
from tests.support.users import run_as

_MARKS = ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.opaque", "user.fuseoverlayfs.opaque",
          "trusted.overlaypy.lazy")  # fmt: skip

TREE: Tree = {
    "open": Dir({"f": File(b"x", mode=0o666), "d": Dir({"kept": b"kept"}, mode=0o777)}, mode=0o777),
    "marked": Dir({"f": b"f"}, mode=0o777, xattrs=dict.fromkeys(_MARKS, b"y")),
}
BELOW: Tree = {"open": Dir({"d": {"below": b"below"}}, mode=0o777), "marked": {"hidden": b"hidden"}}


class Rule(NamedTuple):
    """An act in the directory of the mount, and the errno that every user gets; None for success."""

    what: str
    act: Callable[[str], object]
    answer: int | None


def _on(path: str, act: Callable[..., object], *args: object) -> Callable[[str], object]:
    """An act on something in the mount."""
    return lambda at: act(f"{at}/{path}", *args)


def _made(path: str | Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


def _read(path: str | Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _renamed(path: str) -> None:
    os.rename(os.path.join(os.path.dirname(path), "d"), path)


def _unmarked(path: str) -> None:
    _require(os.listxattr(path) == [])


def _require(fact: bool) -> None:
    if not fact:
        raise OSError(errno.EUCLEAN, "not as it should be")


def _rules() -> Iterator[Rule]:
    for mode in (0, 0o600, 0o666):
        yield Rule(f"whiteout {mode:o}", _on("open/new", os.mknod, stat.S_IFCHR | mode, 0), errno.EPERM)
    for name in (".wh.f", ".wh..wh..opq", ".wh.", ".wh..wh.x"):
        yield Rule(f"create {name}", _on(f"open/{name}", _made), errno.EINVAL)
        yield Rule(f"mkdir {name}", _on(f"open/{name}", os.mkdir), errno.EINVAL)
        yield Rule(f"rename to {name}", _on(f"open/{name}", _renamed), errno.EINVAL)
        yield Rule(f"look at {name}", _on(f"open/{name}", os.stat), errno.ENOENT)
    for name in ("user.fuseoverlayfs.opaque", "user.fuseoverlayfs.origin", "user.overlaypy.lazy"):
        yield Rule(f"set {name}", _on("open/f", os.setxattr, name, b"y"), errno.EPERM)
    for name in _MARKS:
        yield Rule(f"read {name}", _on("marked", os.getxattr, name), errno.ENODATA)
    yield Rule("list marks", _on("marked", _unmarked), None)
    yield Rule("look behind a mark", _on("marked/hidden", os.stat), errno.ENOENT)
    yield Rule("set user.overlay.opaque", _on("open/d", os.setxattr, "user.overlay.opaque", b"y"), None)
    yield Rule("the lower object is still there", _on("open/d/below", os.stat), None)


def _is_plain(path: str) -> None:
    _require(os.getxattr(path, "trusted.overlay.opaque") == b"y")


RULES = tuple(_rules())
RULES_OF_ROOT = (
    Rule("set a mark", _on("open/d", os.setxattr, "trusted.overlay.opaque", b"y"), None),
    Rule("it is an attribute", _on("open/d", _is_plain), None),
    Rule("and no mark", _on("open/d/below", os.stat), None),
    Rule("remove a mark", _on("marked", os.removexattr, "trusted.overlay.redirect"), errno.ENODATA),
    Rule("and what it hides stays hidden", _on("marked/hidden", os.stat), errno.ENOENT),
)


def break_rules(point: Path) -> tuple[int, list[str]]:
    """Run every act as every user; return how many there were, and the wrong results."""
    wrong, count = [], 0
    for role, user in USERS.items():
        rules = RULES + (RULES_OF_ROOT if role == "root" else ())
        results = run_as(user, partial(_answers, rules, point))
        count += len(rules)
        for rule, answer in zip(rules, results, strict=True):
            if answer != rule.answer:
                wrong.append(f"{role}: {rule.what}: {name_of(answer)} instead of {name_of(rule.answer)}")
    return count, wrong


def _answers(rules: Sequence[Rule], point: Path) -> list[int | None]:
    return [errno_of(rule.act, str(point)) for rule in rules]


def reach_into(places: list[Path], sockets: list[Path]) -> tuple[int, list[str]]:
    """Access files and sockets that other users must not reach, as users other than root."""
    acts: dict[str, Callable[[], object]] = {}
    acts |= {f"list {place}": partial(os.listdir, place) for place in places if place.is_dir()}
    acts |= {f"read {place}": partial(_read, place) for place in places}
    acts |= {f"write into {place}": partial(_made, place / "new") for place in places}
    acts |= {f"connect to {path}": partial(_connect, path) for path in sockets}
    wrong = []
    for role in ("owner", "other"):
        results = run_as(USERS[role], lambda: [errno_of(act) for act in acts.values()])
        answers = zip(acts, results, strict=True)
        wrong += [f"{role}: {what}: {name_of(answer)}" for what, answer in answers if answer != errno.EACCES]
    return 2 * len(acts), wrong


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
