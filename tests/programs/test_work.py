"""Programs that work within files: pip, make, SQLite, mmap, several users at once."""

import mmap
import os
import sqlite3
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.programs.conftest import Bench, sh
from tests.programs.sources import write_project, write_wheel
from tests.support.requirements import need_program
from tests.support.users import ALICE, BOB, User, run_as


def test_pip_installs_into_a_venv_of_a_layer(bench: Bench, place: Path) -> None:
    venv.create(bench.low / "env", with_pip=True)
    wheel = write_wheel(place)
    point = bench.mount()
    python = point / "env/bin/python"
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    sh(*pip, "install", "-q", "--no-index", "--no-cache-dir", wheel)
    bench.remount()
    assert sh(point / "env/bin/tiny") == "tiny runs\n"
    assert "tiny" in sh(*pip, "list", "--format=freeze")
    sh(*pip, "check")
    sh(*pip, "uninstall", "-q", "-y", "tiny")
    sh(*pip, "uninstall", "-q", "-y", "setuptools", "pip")
    bench.remount()
    assert sh(python, "-c", "import sys; print(sys.prefix)") == f"{point}/env\n"
    packages = next((point / "env/lib").iterdir()) / "site-packages"
    assert {"pip", "tiny", "setuptools"}.isdisjoint(os.listdir(packages))


def test_make(bench: Bench) -> None:
    """Builds the sources of a layer in the mount; rebuilds only what a change requires, also after a remount."""
    need_program("make", "cc", "ar")
    write_project(bench.low / "project")
    project = bench.mount() / "project"
    sh("make", "-j2", cwd=project)
    assert sh(project / "program") == "250\n"
    bench.remount()
    sh("make", "-q", cwd=project)
    sh("sed", "-i", "s/x [*] 5/x * 6/", project / "f5.c")
    sh("touch", "-r", project / "program", project / "main.c")
    assert "-o f5.o" in sh("make", cwd=project)
    assert sh(project / "program") == "251\n"
    sh("make", "clean", cwd=project)
    assert not (project / "program").exists()


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_updates_a_database_of_a_layer(bench: Bench, journal: str) -> None:
    path = bench.low / "db.sqlite"
    with sqlite3.connect(path) as made:
        made.execute(f"pragma journal_mode={journal}")
        made.execute("create table t (id integer primary key, text)")
        made.executemany("insert into t values (?, ?)", ((number, "x" * 200) for number in range(5000)))
    made.close()
    point = bench.mount()
    _change(point / "db.sqlite", journal)
    sh("sqlite3", point / "db.sqlite", "vacuum; reindex;")
    bench.remount()
    assert sh("sqlite3", point / "db.sqlite", "pragma integrity_check; select count(*), sum(length(text)) from t") == (
        "ok\n4501|899999\n"
    )


def _change(path: Path, journal: str) -> None:
    """One writer with readers beside it: a rolled back transaction, a committed one, and what each side sees."""
    writer, reader = sqlite3.connect(path, isolation_level=None), sqlite3.connect(path)
    try:
        assert writer.execute("pragma journal_mode").fetchone() == (journal,)
        writer.execute("begin")
        writer.execute("delete from t")
        writer.execute("rollback")
        writer.execute("begin immediate")
        writer.execute("delete from t where id % 10 = 0")
        writer.execute("insert into t values (10, 'short')")
        writer.execute("update t set text = text || '!' where id = 11")
        writer.execute("update t set text = substr(text, 1, 194) where id = 11")
        assert reader.execute("select count(*) from t").fetchone() == (5000,)
        reader.rollback()
        writer.execute("commit")
        assert reader.execute("select count(*) from t").fetchone() == (4501,)
    finally:
        reader.close()
        writer.close()


def test_sqlite_writers_in_several_processes(bench: Bench) -> None:
    """Locks are kept between processes: no increment is lost."""
    path = bench.low / "db.sqlite"
    with sqlite3.connect(path) as made:
        made.execute("create table t (n)")
        made.execute("insert into t values (0)")
    made.close()
    point = bench.mount()
    program = (
        "import sqlite3, sys\n"
        "base = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)\n"
        "for _ in range(25):\n"
        "    base.execute('begin immediate')\n"
        "    base.execute('update t set n = n + 1')\n"
        "    base.execute('commit')\n"
    )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: sh(sys.executable, "-c", program, point / "db.sqlite"), range(4)))
    assert sh("sqlite3", point / "db.sqlite", "select n from t; pragma integrity_check") == "100\nok\n"


def test_writing_through_a_mapping(bench: Bench) -> None:
    """A file of a layer is changed only by stores to memory: other names, handles and mappings of it see the change."""
    size = 3 << 20
    (bench.low / "data").write_bytes(b"o" * size)
    os.link(bench.low / "data", bench.low / "same")
    point = bench.mount()
    reader = os.open(point / "same", os.O_RDONLY)
    with open(point / "data", "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        for offset in range(0, size, 65536):
            pages[offset : offset + 3] = b"new"
        pages.flush()
        assert os.pread(reader, 5, 65536) == b"newoo"
        with mmap.mmap(reader, 0, prot=mmap.PROT_READ) as seen:
            assert seen[65536:65541] == b"newoo"
        pages[size - 1] = ord("E")
    os.close(reader)
    bench.remount()
    wanted = bytearray(b"o" * size)
    for offset in range(0, size, 65536):
        wanted[offset : offset + 3] = b"new"
    wanted[-1] = ord("E")
    assert (point / "data").read_bytes() == (point / "same").read_bytes() == bytes(wanted)


def test_an_archive_grows_by_mapping_and_appending(bench: Bench) -> None:
    """Truncate, map, append, punch by turns, as databases and linkers do."""
    (bench.low / "log").write_bytes(b"begin\n")
    point = bench.mount()
    with open(point / "log", "r+b", buffering=0) as file:
        for turn in range(20):
            size = os.fstat(file.fileno()).st_size
            file.truncate(size + 5000)
            with mmap.mmap(file.fileno(), size + 5000) as pages:
                pages[size : size + 4] = b"%04d" % turn
            with open(point / "log", "ab") as tail:
                tail.write(b"tail\n")
    wanted = b"begin\n" + b"".join(b"%04d" % turn + bytes(4996) + b"tail\n" for turn in range(20))
    bench.remount()
    assert (point / "log").read_bytes() == wanted


def test_several_users_share_a_tree(bench: Bench) -> None:
    """Owners, groups, sticky and setgid directories apply to each user of a mount made by root."""
    need_program("runuser")
    for name, mode in (("tmp", 0o1777), ("shared", 0o2775), ("secret", 0o700)):
        (bench.low / name).mkdir()
        (bench.low / name).chmod(mode)
    os.chown(bench.low / "shared", 0, 1001)
    (bench.low / "secret/file").write_text("of root\n")
    (bench.low / "tmp/hers").write_text("")
    os.chown(bench.low / "tmp/hers", 1000, 1000)
    point = bench.mount()
    bench.point.parent.chmod(0o755)
    assert run_as(ALICE, lambda: _create(point / "tmp/a")) == (1000, 1000)
    assert run_as(User(1000, 1000, groups=(1001,)), lambda: _create(point / "shared/a")) == (1000, 1001)
    for user, refused in ((BOB, "tmp/a"), (BOB, "tmp/hers"), (ALICE, "shared/a")):
        with pytest.raises(PermissionError):
            run_as(user, lambda refused=refused: os.unlink(point / refused))  # type: ignore[misc]
    with pytest.raises(PermissionError):
        run_as(ALICE, lambda: os.listdir(point / "secret"))
    run_as(ALICE, lambda: os.unlink(point / "tmp/hers"))
    assert os.listdir(point / "tmp") == ["a"]


def _create(path: Path) -> tuple[int, int]:
    path.write_text("x")
    found = path.stat()
    return found.st_uid, found.st_gid


def test_a_program_run_by_a_user(bench: Bench) -> None:
    """A program started by `runuser` works in a home directory of a layer."""
    need_program("runuser")
    home = bench.low / "home"
    home.mkdir()
    (home / "profile").write_text("old\n")
    for path in (home, home / "profile"):
        os.chown(path, 65534, 65534)
    (bench.low / "other").write_text("of root\n")
    point = bench.mount()
    script = "set -e; cd home; echo new >>profile; mkdir -p a/b; mv profile a/b; ! echo x 2>/dev/null >>../other; id -u"
    sh("runuser", "-u", "nobody", "--", "/bin/sh", "-c", script, cwd=point)
    bench.remount()
    assert (point / "home/a/b/profile").read_text() == "old\nnew\n"
    assert (point / "home/a/b/profile").stat().st_uid == 65534
    assert (point / "other").read_text() == "of root\n"
