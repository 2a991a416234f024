"""The strings of `-o`: those that other programs pass, and invalid ones."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.errors import UsageError
from overlayfs.format.xattrs import Mode
from overlayfs.fs.config import IdRange
from overlayfs.mount.options import Draft, MountOptions, escape_layer, split_layers, split_options


def read(text: bytes) -> Draft:
    draft = Draft()
    draft.read(text)
    return draft


def build(text: bytes) -> MountOptions:
    return read(text).build()


RUN = b"lowerdir=/g/overlay/l/ID1:/g/overlay/l/ID2,upperdir=/g/overlay/ID/diff,workdir=/g/overlay/ID/work,"


def test_the_string_of_podman_run() -> None:
    stack = build(RUN).stack
    assert stack.lower == (b"/g/overlay/l/ID1", b"/g/overlay/l/ID2")
    assert (stack.upper, stack.work) == (b"/g/overlay/ID/diff", b"/g/overlay/ID/work")
    assert not stack.volatile


def test_the_string_of_podman_run_rm_and_build() -> None:
    draft = read(RUN + b",volatile")
    assert draft.build().stack.volatile
    assert draft.unknown == []


def test_the_string_with_id_maps() -> None:
    draft = read(RUN + b",volatile,uidmapping=:0:100000:65536,gidmapping=:0:100000:65536")
    stack = draft.build().stack
    assert stack.uid_map == stack.gid_map == (IdRange(0, 100000, 65536),)
    assert draft.unknown == []


def test_an_id_map_of_several_ranges() -> None:
    stack = build(b"lowerdir=/a,uidmapping=0:1000:1:1:110000:65536").stack
    assert stack.uid_map == (IdRange(0, 1000, 1), IdRange(1, 110000, 65536))


def test_the_string_for_one_id() -> None:
    stack = build(RUN + b",squash_to_uid=1000,squash_to_gid=100").stack
    assert (stack.squash_uid, stack.squash_gid) == (1000, 100)


@pytest.mark.parametrize("text", [b"squash_to_root,squash_to_uid=7", b"squash_to_uid=7,squash_to_root"])
def test_squashing_to_one_id_overrides_squashing_to_root(text: bytes) -> None:
    stack = build(b"lowerdir=/a," + text).stack
    assert (stack.squash_uid, stack.squash_gid) == (7, 0)


@pytest.mark.parametrize("text", [b"lowerdir=/g/ID/diff:/g/l/ID2,ro", b"lowerdir=/g/ID/diff:/g/l/ID2"])
def test_the_string_of_a_diff(text: bytes) -> None:
    options = build(text)
    assert options.stack.upper is options.stack.work is None
    assert options.read_only == text.endswith(b",ro")


def test_the_string_of_an_overlay_volume() -> None:
    draft = read(b"lowerdir=/src,upperdir=/u,workdir=/w,private")
    assert draft.build().stack.lower == (b"/src",)
    assert draft.unknown == ["private"]


def test_force_mask() -> None:
    assert build(RUN + b",xattr_permissions=2").stack.xattr_permissions == 2


def test_commas_inside_quotes_belong_to_the_context() -> None:
    draft = read(RUN + b',context="system_u:object_r:container_file_t:s0:c1,c2",volatile')
    options = draft.build()
    assert options.context == (b"context=system_u:object_r:container_file_t:s0:c1,c2",)
    assert options.stack.volatile
    assert draft.unknown == []


def test_a_quote_in_a_path_is_a_character() -> None:
    stack = build(b'lowerdir=/a"b,upperdir="u",workdir=/w').stack
    assert stack.lower == (b'/a"b',)
    assert stack.upper == os.getcwdb() + b'/"u"'


def test_mountopts_that_storage_conf_passes_on() -> None:
    draft = read(RUN + b",fsync=0,xino=off,noacl,static_nlink,ino32_t")
    stack = draft.build().stack
    assert (stack.volatile, stack.xino, stack.noacl, stack.static_nlink, stack.ino32) == (True, False, True, True, True)
    assert draft.unknown == draft.ignored == []


def test_what_mount_fuse3_puts_around_the_options() -> None:
    draft = read(b"rw,lowerdir=/a,noexec,noatime,nodiratime,dev,suid")
    options = draft.build()
    assert (options.suid, options.dev, options.exec, options.atime, options.diratime) == (
        True,
        True,
        False,
        False,
        False,
    )
    assert draft.unknown == []


def test_an_fstab_line() -> None:
    draft = read(
        b"rw,lowerdir=/a:/b,upperdir=/u,workdir=/w,allow_other,nofail,user,noauto,_netdev,x-systemd.requires-mounts-for=/u"
    )
    assert draft.build().allow_other
    assert draft.unknown == draft.ignored == []


def test_five_hundred_layers_in_one_string() -> None:
    paths = [b"/var/lib/containers/storage/overlay/l/%026d" % number for number in range(500)]
    assert build(b"lowerdir=" + b":".join(paths)).stack.lower == tuple(paths)


def test_escapes() -> None:
    stack = build(rb"lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u\,\:,workdir=/w\\").stack
    assert stack.lower == (b"/a:b", b"/c,d", rb"/e\f")
    assert (stack.upper, stack.work) == (b"/u,:", b"/w\\")


def test_a_layer_may_be_added_by_name() -> None:
    assert build(b"lowerdir+=/a,lowerdir+=/b").stack.lower == (b"/a", b"/b")


def test_relative_paths_count_from_here(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert build(b"lowerdir=l/../m").stack.lower == (os.getcwdb() + b"/l/../m",)


def test_the_last_one_wins() -> None:
    options = build(b"lowerdir=/a,lowerdir=/b,ro,rw,suid,nosuid,timeout=1,timeout=2.5,redirect_dir=on,redirect_dir=off")
    assert options.stack.lower == (b"/b",)
    assert (options.read_only, options.suid, options.timeout, options.stack.redirect_dir) == (False, False, 2.5, False)


def test_choices_of_the_kernel() -> None:
    stack = build(b"lowerdir=/a,redirect_dir=on,metacopy=on,index=off,userxattr,xino=auto").stack
    assert (stack.redirect_dir, stack.metacopy, stack.index, stack.xattr_mode) == (True, True, False, Mode.USER)


def test_choices_of_fuse_overlayfs() -> None:
    options = build(b"lowerdir=/a,writeback=1,noxattrs=1,allow_root,fsname=my tree")
    assert (options.writeback, options.xattrs, options.allow_root, options.source) == (True, False, True, b"my tree")


def test_debug_stays_in_the_foreground() -> None:
    options = build(b"lowerdir=/a,debug")
    assert options.debug and options.foreground


def test_options_without_effect_are_remembered() -> None:
    draft = read(
        b"lowerdir=/a,threaded=1,fast_ino=1,plugins=/x,splice_read,no_splice_write,kernel_cache,max_write=131072"
    )
    assert draft.unknown == []
    assert draft.ignored == [
        "threaded",
        "fast_ino",
        "plugins",
        "splice_read",
        "no_splice_write",
        "kernel_cache",
        "max_write",
    ]


REFUSED = [
    (b"", "no layer is given; name at least one with lowerdir=DIR or --lower DIR"),
    (b"upperdir=/u,workdir=/w", "no layer is given; name at least one with lowerdir=DIR or --lower DIR"),
    (
        b"lowerdir=/a,upperdir=/u",
        "upperdir /u has no workdir; add workdir=DIR, an empty directory on the same file system",
    ),
    (b"lowerdir=/a,workdir=/w", "workdir /w has no upperdir; add upperdir=DIR or leave workdir out"),
    (b"lowerdir=", "lowerdir has an empty entry; write lowerdir=DIR or lowerdir=TOP:NEXT"),
    (b"lowerdir=/a:", "lowerdir has an empty entry; write lowerdir=DIR or lowerdir=TOP:NEXT"),
    (
        b"lowerdir=/a::/d",
        "lowerdir has '::', but data-only layers are not supported; separate layers by one colon",
    ),
    (b"lowerdir=/a,upperdir=", "option upperdir needs a value: a directory"),
    (b"lowerdir=/a,workdir", "option workdir needs a value: a directory"),
    (b"lowerdir=/a,lowerdir+=", "option lowerdir+ needs a value: a directory"),
    (b"lowerdir=/a,remount,ro", "a mount cannot be changed by remount; unmount it and mount it with the new options"),
    (b"lowerdir=/a,uidmapping=0:1", "option uidmapping=0:1 is not a list of CONTAINER:HOST:COUNT triples"),
    (b"lowerdir=/a,gidmapping=", "option gidmapping= is not a list of CONTAINER:HOST:COUNT triples"),
    (b"lowerdir=/a,gidmapping", "option gidmapping needs a value: a list of CONTAINER:HOST:COUNT triples"),
    (b"lowerdir=/a,uidmapping=a:b:c", "option uidmapping=a:b:c is not a list of CONTAINER:HOST:COUNT triples"),
    (b"lowerdir=/a,uidmapping=0:0:0", "option uidmapping has an impossible range 0:0:0"),
    (b"lowerdir=/a,uidmapping=0:4294967295:1", "option uidmapping has an impossible range 0:4294967295:1"),
    (b"lowerdir=/a,squash_to_uid=-1", "option squash_to_uid=-1 is not a number from 0 to 4294967294"),
    (b"lowerdir=/a,squash_to_gid", "option squash_to_gid needs a value: a number from 0 to 4294967294"),
    (b"lowerdir=/a,squash_to_root=maybe", "option squash_to_root=maybe is not on or off"),
    (b"lowerdir=/a,xattr_permissions=3", "option xattr_permissions=3 is not a number from 0 to 2"),
    (b"lowerdir=/a,timeout=soon", "option timeout=soon is not a number of seconds"),
    (b"lowerdir=/a,timeout=-1", "option timeout=-1 is not a number of seconds"),
    (b"lowerdir=/a,timeout=nan", "option timeout=nan is not a number of seconds"),
    (b"lowerdir=/a,timeout", "option timeout needs a value: a number of seconds"),
    (b"lowerdir=/a,redirect_dir=nofollow", "option redirect_dir=nofollow is not one of on, follow, off"),
    (b"lowerdir=/a,metacopy=2", "option metacopy=2 is not on or off"),
    (b"lowerdir=/a,xino", "option xino needs a value: one of on, auto, off"),
    (b"lowerdir=/a,ro=1", "option ro takes no value, but 1 is given"),
    (b"lowerdir=/a,context=", "option context= is not an SELinux context"),
    (b"lowerdir=/a,fsname", "option fsname needs a value: a name to show as the source"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=[text.decode() for text, _ in REFUSED])
def test_refused(text: bytes, sentence: str) -> None:
    with pytest.raises(UsageError) as refusal:
        build(text)
    assert str(refusal.value) == sentence


def test_a_strange_name_is_shown_and_not_fatal() -> None:
    assert read(b"lowerdir=/a,fr\xffob=1").unknown == ["fr\\xffob"]


paths = st.binary(min_size=1).filter(lambda path: b"\0" not in path)


@given(st.lists(paths, min_size=1))
def test_splitting_inverts_escaping(layers: list[bytes]) -> None:
    value = b":".join(map(escape_layer, layers))
    (option,) = split_options(b",lowerdir=" + value + b",,")
    assert split_layers(option.removeprefix(b"lowerdir=")) == layers


@given(st.binary())
def test_no_string_is_too_strange_to_split(text: bytes) -> None:
    options = split_options(text)
    assert all(options)
    for option in options:
        split_layers(option)
