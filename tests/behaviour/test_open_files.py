"""Open files: handles and mappings over copy-up, unlink and rename."""

import fcntl
import mmap
import os
import subprocess
from errno import EBADF, ETXTBSY

import pytest

from tests.support.drivers import Tree
from tests.support.drivers.posix import PosixHandle
from tests.support.spec import Dir, File
from tests.support.spec import Tree as Spec
from tests.support.stacks import StackMaker

PAGE = mmap.PAGESIZE
NOT_MOVED = "a mapping made before copy-up keeps the lower file, as its documentation says"


def descriptor(tree: Tree, path: str, flags: int = os.O_RDONLY) -> int:
    handle = tree.open(path, flags)
    assert isinstance(handle, PosixHandle)
    return handle.fd


def test_a_reader_sees_what_is_written_after_it_opened(stack: StackMaker) -> None:
    tree = stack({"f": "old data"})
    handle = tree.open("f")
    assert handle.read() == b"old data"
    tree.write("f", b"NEW")
    assert tree.read("f") == b"NEW data"
    assert handle.read() == b"NEW data"
    handle.close()


def test_a_reader_sees_the_new_size_too(stack: StackMaker) -> None:
    tree = stack({"f": "old"})
    handle = tree.open("f")
    tree.write("f", b"longer than before")
    assert handle.stat().size == 18
    assert handle.read() == b"longer than before"
    tree.truncate("f", 2)
    assert handle.stat().size == 2
    assert handle.read() == b"lo"
    handle.close()


def test_several_handles_share_the_file(stack: StackMaker) -> None:
    tree = stack({"f": "0123456789"})
    first, second = tree.open("f", os.O_RDWR), tree.open("f", os.O_RDWR)
    first.write(b"A", 0)
    second.write(b"B", 9)
    assert first.read() == second.read() == b"A12345678B"
    first.truncate(5)
    assert second.stat().size == 5
    first.close()
    second.write(b"C", 4)
    second.close()
    assert tree.read("f") == b"A123C"


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("mode", ["read", "write"])
def test_an_unlinked_file_stays_usable_through_its_handle(stack: StackMaker, where: str, mode: str) -> None:
    files: Spec = {"d": {"f": "content"}}
    tree = stack(files if where == "lower" else {}, upper=files if where == "upper" else {})
    handle = tree.open("d/f", os.O_RDWR if mode == "write" else os.O_RDONLY)
    tree.unlink("d/f")
    assert handle.read() == b"content"
    if mode == "write":
        handle.write(b"CON", 0)
        handle.truncate(5)
        assert handle.read() == b"CONte"
        handle.fsync()
    tree.create("d/f", b"other")
    assert handle.read() in (b"CONte", b"content")
    handle.close()
    assert tree.read("d/f") == b"other"
    tree.remount()
    assert tree.read("d/f") == b"other"


@pytest.mark.deviates("kernel", reason="fstat of an unlinked lower file shows the link count of its layer")
@pytest.mark.parametrize("where", ["lower"])
def test_an_unlinked_lower_file_has_no_links(stack: StackMaker, where: str) -> None:
    tree = stack({"f": "content"})
    handle = tree.open("f")
    tree.unlink("f")
    assert handle.stat().nlink == 0
    handle.close()


def test_an_unlinked_upper_file_can_be_changed_by_its_handle(stack: StackMaker) -> None:
    tree = stack({"f": "below"}, upper={"u": "content"})
    for name in ("u", "f"):
        handle = tree.open(name, os.O_RDWR)
        number = handle.stat().ino
        tree.unlink(name)
        handle.chmod(0o751)
        handle.setxattr("user.k", b"v")
        found = handle.stat()
        assert (found.nlink, found.mode & 0o7777, found.ino) == (0, 0o751, number)
        assert handle.getxattr("user.k") == b"v"
        handle.close()
    assert tree.names() == []


@pytest.mark.on("plain", "fs", "fuse")
def test_an_unlinked_lower_file_open_for_reading_can_be_changed(stack: StackMaker) -> None:
    """Not on the kernel, which could not create the copy: the file has no name any more."""
    tree = stack({"f": "content"})
    handle = tree.open("f")
    tree.unlink("f")
    handle.chmod(0o751)
    assert handle.stat().mode & 0o7777 == 0o751
    assert handle.read() == b"content"
    handle.close()
    assert tree.names() == []


def test_a_renamed_file_is_the_same_file(stack: StackMaker) -> None:
    tree = stack({"d": {"f": "content"}})
    handle = tree.open("d/f", os.O_RDWR)
    tree.rename("d/f", "g")
    handle.write(b"C", 0)
    assert tree.read("g") == b"Content"
    tree.rename("d", "e")
    tree.rename("g", "e/h")
    handle.write(b"D", 0)
    assert tree.read("e/h") == b"Dontent"
    handle.close()


def test_fsync(stack: StackMaker) -> None:
    tree = stack({"f": "content", "d": {}})
    handle = tree.open("f", os.O_RDWR)
    handle.write(b"C", 0)
    handle.fsync()
    handle.fsync(datasync=True)
    handle.close()
    handle = tree.open("f")
    handle.fsync()
    handle.close()


@pytest.mark.on("plain", "fuse", "kernel")
def test_fsync_of_a_directory(stack: StackMaker) -> None:
    tree = stack({"d": {"f": ""}})
    fd = os.open(tree.stack.mountpoint / "d", os.O_RDONLY)
    os.fsync(fd)
    tree.create("d/n")
    os.fsync(fd)
    os.close(fd)


@pytest.mark.on("plain", "fuse", "kernel")
def test_appending(stack: StackMaker) -> None:
    tree = stack({"f": "one"})
    for text in (b"two", b"three"):
        fd = descriptor(tree, "f", os.O_WRONLY | os.O_APPEND)
        os.write(fd, text)
        os.write(fd, b",")
    assert tree.read("f") == b"onetwo,three,"


@pytest.mark.on("plain", "fuse", "kernel")
def test_two_appenders_do_not_overwrite_each_other(stack: StackMaker) -> None:
    tree = stack({"f": ""})
    first, second = (descriptor(tree, "f", os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for turn in range(10):
        os.write(first, b"a%d" % turn)
        os.write(second, b"b%d" % turn)
    assert tree.read("f") == b"".join(b"a%db%d" % (turn, turn) for turn in range(10))


@pytest.mark.on("plain", "fuse", "kernel")
def test_shared_mappings_write_through(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * (3 * PAGE))})
    fd = descriptor(tree, "f", os.O_RDWR)
    with mmap.mmap(fd, 3 * PAGE) as mapping:
        mapping[PAGE : PAGE + 5] = b"HELLO"
        mapping.flush()
        assert tree.read("f")[PAGE : PAGE + 6] == b"HELLOx"
        mapping[0:1] = b"Y"
    assert tree.read("f")[:2] == b"Yx"
    tree.remount()
    assert tree.read("f") == b"Y" + b"x" * (PAGE - 1) + b"HELLO" + b"x" * (2 * PAGE - 5)


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_mapping_sees_writes_and_writes_see_the_mapping(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * PAGE)})
    fd = descriptor(tree, "f", os.O_RDWR)
    with mmap.mmap(fd, PAGE) as mapping:
        tree.write("f", b"W", 10)
        assert mapping[10:11] == b"W"
        mapping[20:21] = b"M"
        assert tree.read("f")[20:21] == b"M"


@pytest.mark.on("plain", "fuse", "kernel")
@pytest.mark.deviates("kernel", reason=NOT_MOVED)
def test_a_mapping_made_before_copy_up_sees_the_change(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * PAGE)})
    fd = descriptor(tree, "f")
    with mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        assert mapping[0:1] == b"x"
        tree.write("f", b"NEW")
        assert mapping[0:4] == b"NEWx"


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_private_mapping_keeps_its_own_writes(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * PAGE)})
    fd = descriptor(tree, "f")
    with mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        mapping[0:1] = b"P"
        assert tree.read("f")[0:1] == b"x"


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_mapping_outlives_its_descriptor_and_its_name(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * PAGE)})
    handle = tree.open("f", os.O_RDWR)
    assert isinstance(handle, PosixHandle)
    with mmap.mmap(handle.fd, PAGE) as mapping:
        handle.close()
        tree.unlink("f")
        mapping[0:3] = b"NEW"
        mapping.flush()
        assert mapping[0:4] == b"NEWx"


@pytest.mark.on("plain", "fuse", "kernel")
def test_locks_survive_copy_up(stack: StackMaker) -> None:
    tree = stack({"f": "x"})
    first, second = descriptor(tree, "f"), descriptor(tree, "f")
    fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
    tree.write("f", b"y")
    with pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    late = descriptor(tree, "f", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(first, fcntl.LOCK_UN)
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_running_program_cannot_be_written(stack: StackMaker) -> None:
    with open("/usr/bin/sleep", "rb") as program:
        tree = stack({"sleep": File(program.read(), mode=0o755)})
    running = subprocess.Popen([tree.stack.mountpoint / "sleep", "1000"])
    try:
        tree.write("sleep", b"x", err=ETXTBSY)
    finally:
        running.kill()
        running.wait()
    tree.write("sleep", b"x")


@pytest.mark.on("plain", "fuse", "kernel")
def test_a_program_of_a_lower_layer_runs(stack: StackMaker) -> None:
    with open("/usr/bin/true", "rb") as program:
        tree = stack(
            {"bin": Dir({"true": File(program.read(), mode=0o755), "sh": File(b"#!/bin/sh\nexit 7\n", mode=0o755)})}
        )
    assert subprocess.run([tree.stack.mountpoint / "bin/true"], check=False).returncode == 0
    assert subprocess.run([tree.stack.mountpoint / "bin/sh"], check=False).returncode == 7
    tree.chmod("bin/true", 0o700)
    assert subprocess.run([tree.stack.mountpoint / "bin/true"], check=False).returncode == 0


@pytest.mark.on("plain", "fuse", "kernel")
def test_the_link_of_an_open_unlinked_file(stack: StackMaker) -> None:
    tree = stack({"f": "content"})
    fd = descriptor(tree, "f", os.O_RDWR)
    tree.unlink("f")
    with open(f"/proc/self/fd/{fd}", "rb") as again:
        assert again.read() == b"content"


@pytest.mark.on("plain", "fuse", "kernel")
def test_posix_fallocate_gives_the_size(stack: StackMaker) -> None:
    tree = stack({"f": "x"})
    fd = descriptor(tree, "f", os.O_RDWR)
    os.posix_fallocate(fd, 0, 100_000)
    assert os.fstat(fd).st_size == 100_000
    assert tree.read("f") == b"x" + bytes(99_999)


@pytest.mark.on("plain", "fuse", "kernel")
def test_copy_file_range_copies(stack: StackMaker) -> None:
    tree = stack({"a": File(os.urandom(50_000)), "b": ""})
    source, target = descriptor(tree, "a"), descriptor(tree, "b", os.O_RDWR)
    done = 0
    while copied := os.copy_file_range(source, target, 50_000):
        done += copied
    assert done == 50_000
    assert tree.read("a") == tree.read("b")


def test_large_files(stack: StackMaker) -> None:
    size = 5 << 30
    tree = stack({"f": File(pieces=((size - 4, b"tail"),))})
    assert tree.stat("f").size == size
    handle = tree.open("f", os.O_RDWR)
    assert handle.read(size - 4) == b"tail"
    handle.write(b"HEAD", 3 << 30)
    assert handle.read(3 << 30, 4) == b"HEAD"
    assert handle.read(size - 4) == b"tail"
    handle.close()
    assert tree.stat("f").blocks * 512 < 64 << 20


def test_reading_in_pieces_and_past_the_end(stack: StackMaker) -> None:
    data = os.urandom(300_001)
    tree = stack({"f": File(data)})
    handle = tree.open("f")
    assert handle.read(123_456, 77) == data[123_456 : 123_456 + 77]
    assert handle.read(300_000, 4096) == data[300_000:]
    assert handle.read(300_001, 4096) == b""
    assert handle.read(10**9, 10) == b""
    handle.close()


@pytest.mark.on("plain", "fuse", "kernel")
def test_many_files_open_at_once(stack: StackMaker) -> None:
    tree = stack({f"f{number}": str(number) for number in range(300)})
    handles = [tree.open(f"f{number}", os.O_RDWR) for number in range(300)]
    for number, handle in enumerate(handles):
        assert handle.read() == str(number).encode()
        handle.write(b"x")
    for handle in handles:
        handle.close()
    assert {tree.read(f"f{number}")[:1] for number in range(300)} == {b"x"}


@pytest.mark.on("plain", "fuse", "kernel")
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_the_access_mode_that_neither_reads_nor_writes(stack: StackMaker, where: str) -> None:
    """open(2): access mode 3, which permits only ioctls."""
    spec: Spec = {"f": "data"}
    tree = stack(spec if where == "lower" else {}, upper=spec if where == "upper" else {})
    fd = descriptor(tree, "f", os.O_WRONLY | os.O_RDWR)
    for use in (lambda: os.read(fd, 1), lambda: os.write(fd, b"x")):
        with pytest.raises(OSError) as refused:
            use()
        assert refused.value.errno == EBADF
