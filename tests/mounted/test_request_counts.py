"""How many requests fixed pieces of work take, by kind, cold and warm. Counts are exact where times are not.

The work is done by system calls of our own, in the order in which tar, find, grep, git, cp, rm and SQLite make them:
the programs themselves differ from one version to the next. request_counts.json holds the counts. Another kernel may
send other requests, so on a kernel other than the one named there only their sum is bounded.

OVERLAYFS_UPDATE_COUNTS=1 rewrites the file from the measured counts; review the difference before committing it.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayfs.mount import control_client
from tests.mounted.conftest import Mount
from tests.support import engines
from tests.support.polling import until

TABLE = Path(__file__).with_name("request_counts.json")
UPDATE = bool(os.environ.get("OVERLAYFS_UPDATE_COUNTS"))
KERNEL = ".".join(os.uname().release.split(".")[:2])

DIRECTORIES, FILES = 3, 10
CONTENT = b"line of text\n" * 100
LATE = {"FORGET", "BATCH_FORGET", "RELEASE", "RELEASEDIR"}  # no caller waits for these, so they may come later

Work = Callable[[Path], None]


def _fill(place: Path) -> None:
    for number in range(DIRECTORIES):
        (place / f"d{number}").mkdir(parents=True)
        for file in range(FILES):
            (place / f"d{number}" / f"f{file}").write_bytes(CONTENT)
        (place / f"d{number}" / "link").symlink_to("f0")


def _walk(place: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the paths below a directory and whether each is a directory; each directory is listed once."""
    with os.scandir(place) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_directory in found:
        yield place / name, is_directory
        if is_directory:
            yield from _walk(place / name)


# --- the work --------------------------------------------------------------------------------------------


def untar(point: Path) -> None:
    """Make a tree as root: each file written, then given owner, mode and times."""
    top = point / f"untar{len(list(point.glob('untar*')))}"
    os.mkdir(top)
    for number in range(DIRECTORIES):
        os.mkdir(top / f"d{number}", 0o700)
        for file in range(FILES):
            fd = os.open(top / f"d{number}" / f"f{file}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, CONTENT)
            os.utime(fd, ns=(10**9, 10**9))
            os.fchown(fd, 1000, 1000)
            os.fchmod(fd, 0o644)
            os.close(fd)
        os.utime(top / f"d{number}", ns=(10**9, 10**9))


def find(point: Path) -> None:
    """List everything with its attributes."""
    for path, _ in _walk(point / "tree"):
        os.lstat(path)


def grep(point: Path) -> None:
    """Read every file."""
    for path, is_directory in _walk(point / "tree"):
        if not is_directory and not path.is_symlink():
            fd = os.open(path, os.O_RDONLY)
            os.fstat(fd)
            while os.read(fd, 32768):
                pass
            os.close(fd)


def git_status(point: Path) -> None:
    """As git status: stat what the index names, then list every directory for untracked files."""
    for number in range(DIRECTORIES):
        for file in range(FILES):
            os.lstat(point / "tree" / f"d{number}" / f"f{file}")
    for path, is_directory in _walk(point / "tree"):
        if is_directory:
            (path / ".gitignore").exists()


def copy(point: Path) -> None:
    """Copy the tree within the mount, in the kernel where it can."""
    target = point / f"copy{len(list(point.glob('copy*')))}"
    os.mkdir(target)
    for path, is_directory in _walk(point / "tree"):
        there = target / path.relative_to(point / "tree")
        if is_directory:
            os.mkdir(there)
        elif path.is_symlink():
            os.symlink(os.readlink(path), there)
        else:
            _copy_file(path, there)


def _copy_file(path: Path, there: Path) -> None:
    source = os.open(path, os.O_RDONLY)
    size = os.fstat(source).st_size
    target = os.open(there, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    assert os.copy_file_range(source, target, size) == size
    os.close(source)
    os.close(target)


def remove(point: Path) -> None:
    """Remove a tree, of the layer first, then of the upper."""
    name = "tree" if (point / "tree").exists() else "made"
    for path, is_directory in reversed(list(_walk(point / name))):
        (os.rmdir if is_directory else os.unlink)(path)
    os.rmdir(point / name)


def transactions(point: Path) -> None:
    """Ten commits of a database: a journal written and synced, pages written and synced, the journal removed."""
    database = os.open(point / "database", os.O_RDWR | os.O_CREAT, 0o644)
    for turn in range(10):
        journal = os.open(point / "database-journal", os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(journal, bytes(512), 0)
        os.pwrite(journal, bytes(4096), 512)
        os.fdatasync(journal)
        os.pread(database, 4096, 0)
        os.pwrite(database, bytes(4096), turn * 4096)
        os.fdatasync(database)
        os.fstat(database)
        os.close(journal)
        os.unlink(point / "database-journal")
    os.close(database)


def copy_up(point: Path) -> None:
    """First changes of files of a layer: data of some, attributes of others."""
    here = point / "tree" / "d0"
    for file in range(5):
        fd = os.open(here / f"f{file}", os.O_RDWR)
        os.pwrite(fd, b"x", 0)
        os.close(fd)
    for file in range(5, FILES):
        os.chmod(here / f"f{file}", 0o600)


def small_writes(point: Path) -> None:
    """A megabyte in pieces of four kilobytes."""
    fd = os.open(point / "large", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for _ in range(256):
        os.write(fd, bytes(4096))
    os.close(fd)


WORK: dict[str, Work] = {
    each.__name__: each for each in (untar, find, grep, git_status, copy, remove, transactions, copy_up, small_writes)
}


# --- counting --------------------------------------------------------------------------------------------


def _all(mount: Mount) -> Counter[str]:
    return Counter(control_client.Client.at(os.fsencode(mount.point)).stats().requests)


def _cost(mount: Mount, work: Work) -> dict[str, int]:
    before = _all(mount)
    work(mount.point)
    spent = _all(mount) - before
    return {kind: count for kind, count in sorted(spent.items()) if kind not in LATE}


def _expected(engine: str, name: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(TABLE.read_text())[engine][name]
    return found


@pytest.mark.parametrize("name", WORK)
def test_requests(mount: Mount, name: str) -> None:
    _fill(mount.stack.base / "low" / "tree")
    _fill(mount.stack.upper / "made")
    mount.start()
    found = {"cold": _cost(mount, WORK[name]), "warm": _cost(mount, WORK[name])}
    _everything_is_released(mount)
    mount.unmount()
    if UPDATE:
        _write(engines.current(), name, found)
    _compare(found, _expected(engines.current(), name))


def _compare(found: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> None:
    if json.loads(TABLE.read_text())["counted on Linux"] == KERNEL:
        assert found == expected
        return
    for when, counts in found.items():
        assert sum(counts.values()) <= 1.5 * sum(expected[when].values()) + 5, (when, counts, expected[when])


def _everything_is_released(mount: Mount) -> None:
    """Each open is soon followed by its release; otherwise open files would accumulate in the daemon."""

    def even() -> bool:
        counts = _all(mount)
        return counts["RELEASE"] == counts["OPEN"] + counts["CREATE"]

    until(even)


def _write(engine: str, name: str, found: dict[str, dict[str, int]]) -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table["counted on Linux"] = KERNEL
    table.setdefault(engine, {})[name] = found
    lines = [f' "counted on Linux": {json.dumps(table.pop("counted on Linux"))}']
    for each, workloads in sorted(table.items()):
        rows = (
            f'  "{work}": {{\n   "cold": {json.dumps(costs["cold"])},\n   "warm": {json.dumps(costs["warm"])}\n  }}'
            for work, costs in workloads.items()
        )
        lines.append(f' "{each}": {{\n' + ",\n".join(rows) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
