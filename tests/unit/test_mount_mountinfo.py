"""Reading /proc/self/mountinfo."""

from overlayfs.mount.mountinfo import kernel_mounts, parse, unescape


def test_octal_escapes_are_undone() -> None:
    assert unescape(rb"/a\040b\011c\012d\134e") == b"/a b\tc\nd\\e"
    assert unescape(b"/\xff\xfe") == b"/\xff\xfe"


def test_a_line_with_optional_fields() -> None:
    line = (
        rb"36 35 0:98 / /mnt/x\040y rw,nosuid,noatime shared:1 master:2 - fuse.overlayfs over\054lay "
        rb"ro,user_id=0,group_id=0"
    )
    mount = parse(line)
    assert mount.device == b"0:98"
    assert mount.root == b"/"
    assert mount.mountpoint == b"/mnt/x y"
    assert mount.type == b"fuse.overlayfs"
    assert mount.source == b"over,lay"
    assert {b"nosuid", b"ro", b"user_id=0"} <= mount.options


def test_a_line_without_optional_fields() -> None:
    assert parse(b"1 0 8:1 /sub / rw - ext4 /dev/sda1 rw").root == b"/sub"


def test_this_machine_has_a_root() -> None:
    assert b"/" in {mount.mountpoint for mount in kernel_mounts()}
