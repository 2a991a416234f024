"""Many clients at once: one copy-up, no lost write, no deadlock, whatever happens while a file is being copied up."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.mounted.conftest import Mount

SIZE = 4 << 20


def _together(*acts: Callable[[], None]) -> None:
    start = threading.Barrier(len(acts))
    failures: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        start.wait()
        try:
            act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a request hangs"
    assert failures == []


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def test_many_first_writers_of_one_file(mount: Mount) -> None:
    old = os.urandom(SIZE)
    rounds = 8
    for turn in range(rounds):
        (mount.stack.base / "low" / f"big{turn}").write_bytes(old)
    mount.start()
    for turn in range(rounds):
        path = mount.point / f"big{turn}"
        _together(*(lambda at=at, path=path: _write_at(path, at * 1000, b"%04d" % at) for at in range(8)))
        expected = bytearray(old)
        for at in range(8):
            expected[at * 1000 : at * 1000 + 4] = b"%04d" % at
        assert path.read_bytes() == expected
    mount.unmount()
    assert os.listdir(mount.stack.work / "work") == []


def _ignoring(act: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with suppress(FileNotFoundError):
            act()

    return run


def test_names_change_while_a_file_is_copied_up(mount: Mount) -> None:
    old = os.urandom(SIZE)
    rounds = 12
    for turn in range(rounds):
        (mount.stack.base / "low" / f"dir{turn}").mkdir()
        (mount.stack.base / "low" / f"dir{turn}" / "big").write_bytes(old)
        os.link(mount.stack.base / "low" / f"dir{turn}" / "big", mount.stack.base / "low" / f"twin{turn}")
    mount.start()
    for turn in range(rounds):
        here = mount.point / f"dir{turn}"
        big, moved, link = here / "big", here / "moved", here / "link"
        os.stat(mount.point / f"twin{turn}")
        _together(
            _ignoring(lambda: _write_at(big, 10, b"new")),  # noqa: B023 - all are called before the next turn
            _ignoring(lambda: os.rename(big, moved)),  # noqa: B023
            _ignoring(lambda: os.chmod(big, 0o640)),  # noqa: B023
            _ignoring(lambda: os.link(big, link)),  # noqa: B023
            _ignoring(lambda: os.truncate(moved, SIZE - 1)),  # noqa: B023
            _ignoring(lambda: os.setxattr(moved, "user.a", b"b")),  # noqa: B023
            _ignoring(lambda: os.rename(here, mount.point / f"other{turn}")),  # noqa: B023
            _ignoring(lambda: os.stat(big)),  # noqa: B023
        )
        (path,) = [path for name in ("big", "moved") if (path := mount.point / f"other{turn}" / name).exists()]
        found = path.read_bytes()
        assert found[:10] == old[:10]
        assert found[13:] in (old[13:], old[13:-1])
        assert found == (mount.point / f"twin{turn}").read_bytes()
    mount.unmount()
    assert os.listdir(mount.stack.work / "work") == []


def test_a_file_is_removed_while_it_is_copied_up(mount: Mount) -> None:
    rounds = 12
    for turn in range(rounds):
        (mount.stack.base / "low" / f"big{turn}").write_bytes(b"o" * SIZE)
    mount.start()
    for turn in range(rounds):
        path = mount.point / f"big{turn}"

        def write(path: Path = path) -> None:
            with suppress(FileNotFoundError), open(path, "r+b", buffering=0) as file:
                file.write(b"new")
                assert os.pread(file.fileno(), 5, 0) == b"newoo"
                assert os.fstat(file.fileno()).st_size == SIZE

        _together(write, lambda path=path: os.unlink(path), write)  # type: ignore[misc]
        assert not path.exists()
    assert not [name for name in os.listdir(mount.point) if name.startswith("big")]
    mount.unmount()
    assert os.listdir(mount.stack.work / "work") == []


def test_an_earlier_reader_sees_later_writes(mount: Mount) -> None:
    mount.start()
    path = mount.point / "d" / "f"
    with open(path, "rb", buffering=0) as reader:
        assert reader.read(3) == b"low"
        _write_at(path, 0, b"new")
        assert os.pread(reader.fileno(), 6, 0) == b"newlow"
    mount.unmount()
