"""What copy-up costs: the first change to a file of a layer, measured file by file.

Every round mounts each contender with a fresh upper, in another order each time, and makes every change once to files
of its own, so that no change finds a file copied by another one. The layer is warm: its content is in the page cache.
Each change is checked afterwards, in the mount and in the layer, which must be as it was; a contender that does
something else has failed at that case and gets no figure.
"""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from overlayfs_cli.benchmark import contenders
from overlayfs_cli.benchmark.contenders import Contender, Mounted, RefusedError

BLOCK = 4096  # bytes of a first write, and of an append
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = (0, 4 * KIB, MIB, 100 * MIB, GIB)
DEEP = 20  # directories above the file in the case "deep"
SPARSE_DATA = MIB  # bytes of data in the middle of a file that is otherwise a hole
OLD = 1_600_000_000  # seconds; the times of all files of the layer
LAYER = "layer"

ShowProgress = Callable[[str], None]
Make = Callable[[Path, int], None]  # the file of a case, and its size


class WrongError(Exception):
    """A change was not made, or more than it was changed."""


@dataclass(frozen=True)
class Operation:
    """A change to one file: what is timed, how many bytes its user writes, and what the file is afterwards."""

    act: Callable[[Path], None]
    check: Callable[[Path, int], None]
    written: int = 0


def _write(path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(b"w" * BLOCK)


def _append(path: Path) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(b"w" * BLOCK)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _new_name(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _has(path: Path, size: int, offset: int, data: bytes) -> None:
    """WrongError unless a file has a size, and bytes at a place."""
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size:
            raise WrongError(f"the size is {os.fstat(file.fileno()).st_size} instead of {size}")
        if os.pread(file.fileno(), len(data), offset) != data:
            raise WrongError(f"the bytes at {offset} are wrong")


def _check_write(path: Path, size: int) -> None:
    _has(path, max(size, BLOCK), 0, b"w" * BLOCK)
    if size > BLOCK:
        _has(path, size, size - 1, last_byte(size))


def _check_same(path: Path, size: int) -> None:
    _has(path, size, max(0, size - 1), last_byte(size))


def _check_chmod(path: Path, size: int) -> None:
    _check_same(path, size)
    if path.stat().st_mode & 0o777 != 0o600:
        raise WrongError("the mode was not changed")


def _check_touch(path: Path, size: int) -> None:
    _check_same(path, size)
    if path.stat().st_mtime == OLD:
        raise WrongError("the time was not changed")


def _check_rename(path: Path, size: int) -> None:
    _check_same(_new_name(path), size)
    if path.exists():
        raise WrongError("the old name is still there")


def _check_link(path: Path, size: int) -> None:
    _check_same(_new_name(path), size)
    if not os.path.samefile(path, _new_name(path)):
        raise WrongError("the two names are two files")


WRITE = "first write of 4 KiB"
OPERATIONS = {
    WRITE: Operation(_write, _check_write, BLOCK),
    "append of 4 KiB": Operation(_append, lambda path, size: _has(path, size + BLOCK, size, b"w" * BLOCK), BLOCK),
    "truncate to half": Operation(_truncate, lambda path, size: _has(path, size // 2, 0, b"")),
    "chmod": Operation(lambda path: path.chmod(0o600), _check_chmod),
    "touch": Operation(os.utime, _check_touch),
    "rename": Operation(lambda path: os.rename(path, _new_name(path)), _check_rename),
    "link": Operation(lambda path: os.link(path, _new_name(path)), _check_link),
}


def last_byte(size: int) -> bytes:
    """Return what the last byte of a file of the layer is; nothing for an empty file."""
    return b"e" if size else b""


def _dense(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(min(size, MIB))  # what compresses would flatter a file system that compresses
    with open(path, "wb", buffering=0) as file:
        file.writelines(block[: size - at] for at in range(0, size, MIB))
        if size:
            os.pwrite(file.fileno(), last_byte(size), size - 1)


def _sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        os.truncate(file.fileno(), size)
        os.pwrite(file.fileno(), os.urandom(SPARSE_DATA), size // 2 & -BLOCK)
        os.pwrite(file.fileno(), last_byte(size), size - 1)


@dataclass(frozen=True)
class Case:
    """One change, to `files` files of one size in each round. `where` says what is special about them."""

    operation: str
    size: int
    files: int
    where: str = ""
    make: Make = _dense

    @property
    def place(self) -> str:
        """The directory of its files, in the layer."""
        return "-".join([*self.operation.split(), str(self.size), *self.where.split()])

    def names(self) -> Iterator[str]:
        """Give the paths of its files, from the root of the layer."""
        below = "/".join(["deep"] * DEEP) + "/" if self.where == "deep" else ""
        for number in range(self.files):
            middle = f"{number}/{below}" if below else ""
            yield f"{self.place}/{middle}file{number}"


def cases(limit: int, many: int) -> list[Case]:
    """Return the cases with files up to `limit` bytes; `many` files lie in the directory that is touched."""
    sizes = [size for size in SIZES if size <= limit]
    found = [Case(name, size, _files(size)) for name in OPERATIONS if name != "touch" for size in sizes]
    found.append(Case(WRITE, 4 * KIB, 10, "deep"))
    if limit >= 4 * MIB:
        found.append(Case(WRITE, min(limit, GIB), 1, "sparse", _sparse))
    found.append(Case("touch", 4 * KIB, many, "one directory"))
    return found


def _files(size: int) -> int:
    return 20 if size <= MIB else 1


@dataclass
class Cost:
    """What one case has cost one contender: seconds of each change, bytes that were stored in the upper for each."""

    case: Case
    contender: str
    seconds: list[float] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)  # bytes for each file, one number for each round
    failed: str = ""

    @property
    def median(self) -> float | None:
        """The median of all changes in seconds; None if there is none."""
        return statistics.median(self.seconds) if self.seconds and not self.failed else None

    @property
    def bytes_stored(self) -> int | None:
        """The bytes that the upper holds for each changed file; None where there is no upper."""
        return int(statistics.median(self.stored)) if self.stored and not self.failed else None

    @property
    def amplification(self) -> float | None:
        """Bytes stored for each byte that was written; None if nothing was written."""
        written = OPERATIONS[self.case.operation].written
        return self.bytes_stored / written if written and self.bytes_stored is not None else None


def space_needed(wanted: Sequence[Case]) -> int:
    """Return the bytes that a measurement takes at most: the layer, an upper and the plain copy."""
    return 3 * sum(case.files * max(case.size, 4 * KIB) for case in wanted if case.make is _dense) + 64 * MIB


def fill(base: Path, wanted: Sequence[Case]) -> None:
    """Make the layer."""
    for case in wanted:
        for name in case.names():
            path = base / LAYER / name
            case.make(path, case.size)
            os.utime(path, (OLD, OLD))
    sync(base)


def sync(place: Path) -> None:
    """Write out dirty pages of a file system, so that no measurement waits for what an earlier one wrote."""
    subprocess.run(["sync", "-f", str(place)], check=True)


def measure(
    able: Sequence[Contender],
    wanted: Sequence[Case],
    base: Path,
    rounds: int,
    show: ShowProgress,
    exclusive: bool = False,
) -> list[Cost]:
    """Return the costs, by case and then by contender. The layer must have been filled.

    `exclusive`: no other program writes to the file system, so the change of its free space is what was stored, which
    is exact where blocks are shared (clones); otherwise the blocks of the files are counted.
    """
    costs = {(case, each.name): Cost(case, each.name) for case in wanted for each in able}
    for turn in range(rounds):
        for contender in [*able[turn % len(able) :], *able[: turn % len(able)]]:
            show(f"round {turn + 1} of {rounds}: {contender.name}")
            try:
                with _tree(contender, base) as mount:
                    for case in wanted:
                        _one(costs[case, contender.name], mount, base, exclusive)
            except RefusedError as error:
                _fail(costs.values(), contender, str(error))
    return list(costs.values())


def _fail(costs: Iterable[Cost], contender: Contender, reason: str) -> None:
    for cost in costs:
        if cost.contender == contender.name:
            cost.failed = cost.failed or reason


@contextmanager
def _tree(contender: Contender, base: Path) -> Iterator[Mounted]:
    """Give a fresh mount, or a fresh copy of the layer in a plain directory."""
    if contender.kind != contenders.PLAIN:
        with contenders.mounted(contender, base, (LAYER,)) as mount:
            sync(base)
            yield mount
        return
    with tempfile.TemporaryDirectory(dir=base, prefix="run.") as directory:
        root = Path(directory) / "plain"
        words = ["cp", "-a", "--reflink=never", "--sparse=always", str(base / LAYER), str(root)]
        subprocess.run(words, check=True)
        sync(base)
        yield Mounted(root, root, None)


def _one(cost: Cost, mount: Mounted, base: Path, exclusive: bool) -> None:
    """Make the changes of one case in one mount and add what they cost."""
    operation = OPERATIONS[cost.case.operation]
    paths = [mount.root / name for name in cost.case.names()]
    before = _stored(mount, base, exclusive)
    try:
        seconds = [_timed(operation.act, path) for path in paths]
        sync(base)
        after = _stored(mount, base, exclusive)
        for name in cost.case.names():
            operation.check(mount.root / name, cost.case.size)
            _check_layer(base / LAYER / name, cost.case.size)
    except (OSError, WrongError) as error:
        cost.failed = cost.failed or str(error)
        return
    cost.seconds += seconds
    if mount.root != mount.upper:
        cost.stored.append((after - before) // len(paths))


def _timed(act: Callable[[Path], None], path: Path) -> float:
    begun = time.perf_counter()
    act(path)
    return time.perf_counter() - begun


def _check_layer(path: Path, size: int) -> None:
    """WrongError if a file of the layer is not what it was."""
    _check_same(path, size)
    if path.stat().st_mtime != OLD:
        raise WrongError(f"the layer was changed: {path.name}")


def _stored(mount: Mounted, base: Path, exclusive: bool) -> int:
    """Return the bytes that are stored now."""
    if exclusive:
        space = os.statvfs(base)
        return (space.f_blocks - space.f_bfree) * space.f_frsize
    if mount.root == mount.upper:
        return 0
    found = {}
    for directory, _, names in os.walk(mount.upper):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())
