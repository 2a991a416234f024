"""Data workloads: large files written and read, whole and in blocks, sequentially and at random."""

import json
import mmap
import os
import random
import shutil
import sqlite3

from bench.workload import Step, Trial, Workload, expect

GROUP = "data"
RANDOM_BLOCK = 4096


def write_blocks(block: int, synced: bool = False) -> Step:
    """Return a step that writes a new file in blocks of that many bytes."""

    def act(trial: Trial) -> None:
        data = b"x" * block
        total = blocks(trial)
        with open(trial.path("new"), "wb", buffering=0) as file:
            file.writelines(data for _ in range(total // block))
            if synced:
                os.fsync(file.fileno())

    return act


def blocks(trial: Trial) -> int:
    """Return the bytes that are written and read: the size of the prepared file."""
    return (trial.site.layers("data") / "whole/data").stat().st_size


def written(trial: Trial) -> None:
    """Check the size and a few places of what was written."""
    with open(trial.path("new"), "rb") as file:
        expect(os.fstat(file.fileno()).st_size == blocks(trial), "the new file is too short")
        for at in (0, blocks(trial) // 2, blocks(trial) - 1):
            file.seek(at)
            expect(file.read(1) == b"x", f"byte {at} of the new file is wrong")


def read_all(trial: Trial) -> None:
    """Read the lower file in blocks of 1 MiB."""
    buffer = bytearray(1 << 20)
    size = 0
    with open(trial.path("data"), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
    trial.remembered = size


def all_read(trial: Trial) -> None:
    """Check that everything was read."""
    expect(trial.remembered == blocks(trial), f"{trial.remembered} bytes were read instead of {blocks(trial)}")


def own_file(trial: Trial) -> None:
    """Make a file in the upper as large as the prepared one, for random access."""
    shutil.copyfile(trial.site.layers("data") / "whole/data", trial.path("own"))


def random_blocks(trial: Trial) -> None:
    """Read and write blocks of 4 KiB at random places of an own file, half and half."""
    generator = random.Random(5)
    size = blocks(trial) // RANDOM_BLOCK
    with open(trial.path("own"), "r+b", buffering=0) as file:
        for number in range(size // 4):
            place = generator.randrange(size) * RANDOM_BLOCK
            if number % 2:
                os.pwrite(file.fileno(), b"y" * RANDOM_BLOCK, place)
            else:
                os.pread(file.fileno(), RANDOM_BLOCK, place)
    trial.remembered = place


def random_done(trial: Trial) -> None:
    """Check the last block that was written."""
    assert isinstance(trial.remembered, int)
    with open(trial.path("own"), "rb") as file:
        file.seek(trial.remembered)
        expect(file.read(RANDOM_BLOCK) == b"y" * RANDOM_BLOCK, "the last block is not in the file")


def mapped(trial: Trial) -> None:
    """Write one byte into every page of an own file through a shared mapping."""
    with open(trial.path("own"), "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 0x7A
        memory.flush()
    trial.remembered = 0


def mapped_done(trial: Trial) -> None:
    """Check the first and the last page."""
    with open(trial.path("own"), "rb") as file:
        first = file.read(1)
        file.seek(-mmap.PAGESIZE, os.SEEK_END)
        expect(first == file.read(1) == b"z", "the mapping did not reach the file")


def fio(pattern: str, direct: int) -> Step:
    """Return a step that runs fio for one job of 4 KiB blocks; its value is MiB per second."""

    def act(trial: Trial) -> None:
        megabytes = max(8, blocks(trial) >> 23)
        trial.shell(
            f"fio --name=job --filename=own --rw={pattern} --bs=4k --direct={direct} --size={blocks(trial)}"
            f" --io_size={megabytes}m --ioengine=psync --randseed=6 --output-format=json --end_fsync=0"
        )
        job = json.loads(trial.seen)["jobs"][0]
        expect(job["error"] == 0, f"fio ends with error {job['error']}")
        side = "read" if "read" in pattern else "write"
        expect(job[side]["io_bytes"] == megabytes << 20, "fio has not moved all its bytes")
        trial.value = job[side]["bw_bytes"] / (1 << 20)

    return act


def open_database(trial: Trial) -> None:
    """Make a database with one table."""
    with sqlite3.connect(trial.path("base.sqlite")) as connection:
        connection.execute("create table entries (number integer primary key, text text)")
    connection.close()


def insert(journal: str) -> Step:
    """Return a step that inserts rows, each in a transaction of its own that SQLite syncs to the disk."""

    def act(trial: Trial) -> None:
        connection = sqlite3.connect(trial.path("base.sqlite"), isolation_level=None)
        connection.execute(f"pragma journal_mode={journal}")
        connection.execute("pragma synchronous=full")
        for number in range(trial.site.sizes.inserts):
            connection.execute("insert into entries (text) values (?)", (f"entry {number} " * 10,))
        connection.close()

    return act


def inserted(trial: Trial) -> None:
    """Check that every row is there."""
    connection = sqlite3.connect(trial.path("base.sqlite"))
    found = connection.execute("select count(*) from entries").fetchone()[0]
    connection.close()
    expect(found == trial.site.sizes.inserts, f"{found} rows instead of {trial.site.sizes.inserts}")


def _dd(name: str, block: int, synced: bool = False) -> Workload:
    return Workload(name, GROUP, "data", write_blocks(block, synced), written, copies_up=False)


def _random(name: str, pattern: str, direct: int) -> Workload:
    return Workload(
        name, GROUP, "data", fio(pattern, direct), before=own_file, copies_up=False, unit="MiB/s", more_is_better=True
    )


def _sqlite(name: str, journal: str) -> Workload:
    return Workload(name, GROUP, "empty", insert(journal), inserted, before=open_database, copies_up=False)


WORKLOADS = (
    _dd("write 4 KiB blocks", 4096),
    _dd("write 1 MiB blocks", 1 << 20),
    _dd("write 1 MiB blocks, fsync", 1 << 20, synced=True),
    Workload("read cold", GROUP, "data", read_all, all_read, cold=True, changes=False, copies_up=False),
    Workload("read warm", GROUP, "data", read_all, all_read, before=read_all, changes=False, copies_up=False),
    Workload("random 4 KiB", GROUP, "data", random_blocks, random_done, before=own_file, copies_up=False),
    Workload("mmap", GROUP, "data", mapped, mapped_done, before=own_file, copies_up=False),
    _random("fio random read", "randread", 0),
    _random("fio random write", "randwrite", 0),
    _random("fio random read, direct", "randread", 1),
    _random("fio random write, direct", "randwrite", 1),
    _sqlite("SQLite insert", "delete"),
    _sqlite("SQLite insert, WAL", "wal"),
)
