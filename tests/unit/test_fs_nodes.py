"""The table of nodes: which ones are dropped, in which order, and which ones must stay."""

import stat

from overlayfs.fs.nodes import ROOT_NUMBER, Dir, File, NodeTable


def directory(table: NodeTable, number: int, parent: Dir, name: bytes) -> Dir:
    """A directory without references."""
    made = Dir(number, parent, name, False, (), False)
    table.add(made, parent, name, False)
    return made


def file(table: NodeTable, number: int, parent: Dir) -> File:
    """A file without references."""
    made = File(number, stat.S_IFREG, False, None)
    table.add(made, parent, b"file", False)
    return made


def root(table: NodeTable) -> Dir:
    """The root, which is never unreferenced."""
    made = Dir(ROOT_NUMBER, None, b"", True, (), False)
    table.add_root(made)
    return made


def test_files_that_leave_empty_directories_behind() -> None:
    """Dropping a node may leave its directory unreferenced, which is dropped in turn: any number, one by one."""
    table = NodeTable(ino32=False)
    top = root(table)
    files = []
    for number in range(2, 10_000, 2):
        files.append(file(table, number + 1, directory(table, number, top, b"%d" % number)))
        table.remember(files[-1])
    for each in files:
        table.forget(each.number, 1)
    assert len(table) < 5_000


def test_no_node_is_dropped_while_a_request_may_use_it() -> None:
    table = NodeTable(ino32=False)
    top = root(table)
    table.keep(True)
    for number in range(2, 10_000):
        directory(table, number, top, b"%d" % number)
    assert len(table) == 9_999
    table.keep(False)
    assert len(table) < 2_000
