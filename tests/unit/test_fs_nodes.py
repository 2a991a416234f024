"""The table of nodes: who goes when many only rest."""

import stat

from overlayfs.fs.nodes import ROOT_NUMBER, Dir, File, Node, NodeTable


def _known(table: NodeTable, node: Node, parent: Dir, name: bytes) -> None:
    """Take in a node that nobody counts on."""
    table.attach(node, parent, name, False)
    table.add(node)


def test_files_that_leave_empty_directories_behind() -> None:
    """Each that goes lets its directory rest, which may let another one go: however many, one after the other."""
    table = NodeTable(ino32=False)
    root = Dir(ROOT_NUMBER, None, b"", True, (), False)
    table.add(root)
    files = []
    for number in range(2, 10_000, 2):
        directory, file = (
            Dir(number, root, b"%d" % number, False, (), False),
            File(number + 1, stat.S_IFREG, False, None),
        )
        _known(table, directory, root, b"%d" % number)
        _known(table, file, directory, b"file")
        table.remember(file)
        files.append(file)
    for file in files:
        table.forget(file.number, 1)
    assert len(table) < 5_000
