"""The store for Python programs: the examples of docs/python-api.md work."""

import os
import pathlib
import re
from pathlib import Path

import pytest

from overlayfs import Overlay, StackConfig, Store
from overlayfs.errors import UserError
from overlayfs.store.commit import NothingToCommitError
from overlayfs.store.records import ImageRecord, now
from tests.store.samples import add_image, fill
from tests.support.requirements import need_root
from tests.support.users import ALICE, run_as

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"


def _example(word: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return next(str(block) for block in blocks if word in block)


@pytest.mark.root
def test_the_example_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = os.fsencode(place / "store")
    with Store(base) as store:
        add_image(store, "base", {"etc/motd": "base"})
    code = _example("new_layer").replace('b"/srv/store"', repr(base))
    change = 'fill(store.workspace("draft").upper_path, {"new": "text"})'
    exec(code.replace("    ...\n", f"    {change}\n"), {"os": os, "pathlib": pathlib, "fill": fill})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown[:2]] == ["changes", "front"]
    assert shown[-1] == "[]"
    with Store(base, create=False) as store:
        assert [image.name for image in store.images()] == ["base:latest", "site:v1", "site:v2"]
        top, middle, _ = store.stack_of("site:v2")
        assert (top.record.state, middle.record.author) == ("complete", "ann")


@pytest.mark.root
def test_a_plain_upper(place: Path) -> None:
    with Store(os.fsencode(place / "store")) as store:
        add_image(store, "base", {"a": "1"}, {"b": "2"})
        lower = tuple(layer.tree_path for layer in store.stack_of("base"))
        for name in ("u", "w"):
            (place / name).mkdir()
        config = StackConfig(lower=lower, upper=os.fsencode(place / "u"), work=os.fsencode(place / "w"))
        with pytest.raises(NothingToCommitError):
            store.commit_upper(config, image="next")
        (place / "u" / "c").write_text("3")
        layer = store.commit_upper(config, image="next", message="mine", author="me")
        assert [each.id for each in store.stack_of("next")] == [layer.id, *store.image("base").layers]
        assert (layer.record.state, layer.record.message, layer.record.author) == ("complete", "mine", "me")
        assert [step.comment for step in store.image("next").history] == ["", "", "mine"]
        strange = StackConfig(lower=(os.fsencode(place),), upper=config.upper, work=config.work)
        with pytest.raises(UserError, match="is not a layer of the store"):
            store.commit_upper(strange, image="next")


@pytest.mark.root
def test_texts_that_are_not_utf8(place: Path) -> None:
    """Bytes of the command line that are not UTF-8 are replaced in records."""
    with Store(os.fsencode(place / "store")) as store:
        add_image(store, "base", {"a": "1"})
        fill(store.new_workspace("base", "mine").upper_path, {"b": "2"})
        layer = store.commit_workspace(
            "mine", image="next", message=os.fsdecode(b"a\xffb"), author=os.fsdecode(b"\xfe")
        )
        assert (layer.record.message, layer.record.author) == (
            "a\N{REPLACEMENT CHARACTER}b",
            "\N{REPLACEMENT CHARACTER}",
        )
        assert store.image("next").history[-1].comment == layer.record.message


@pytest.mark.root
def test_an_image_keeps_configuration_and_history_of_its_base(place: Path) -> None:
    """Configuration, platform and history are kept, unless the base image names another stack by now."""
    with Store(os.fsencode(place / "store")) as store:
        base = add_image(store, "base", {"a": "1"})
        record = ImageRecord(
            name="base", layers=base.layers, created=now(), architecture="arm64", config={"Cmd": ["/x"]}, variant="v8"
        )
        store.put_image(record)
        for name in ("one", "two"):
            fill(store.new_workspace("base", name).upper_path, {"b": name})
        store.commit_workspace("one", image="next")
        made = store.image("next")
        assert (made.architecture, made.variant, made.config) == ("arm64", "v8", {"Cmd": ["/x"]})
        add_image(store, "base", {"a": "another"})
        store.commit_workspace("two", image="late")
        assert (store.image("late").architecture, store.image("late").config) == ("", {})


def test_without_privilege(place: Path) -> None:
    """A user's own store is private whatever the umask; its layers have the attributes that the user may write."""
    need_root()  # to become that user
    os.chown(place, ALICE.uid, ALICE.gid)

    def work() -> tuple[list[str], list[str]]:
        with Store(os.fsencode(place / "store")) as store:
            add_image(store, "base", {"a": "1", "d/x": "2"})
            store.new_workspace("base", "mine")
            _rename(store, "mine", b"d", b"e")
            layer = store.commit_workspace("mine", image="next")
            made = sorted(os.listdir(layer.tree_path))
            for name in ("mine", "base", "next"):
                store.remove(name)
        with Store(os.fsencode(place / "store")) as store:
            return [os.fsdecode(name) for name in made], [each.kind for each in store.gc()]

    assert run_as(ALICE, work) == (["d", "e"], ["layer", "layer"])
    for path in (place / "store").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def _rename(store: Store, name: str, old: bytes, new: bytes) -> None:
    workspace = store.workspace(name)
    lower = tuple(layer.tree_path for layer in store.stack_of(name))
    overlay = Overlay(StackConfig(lower=lower, upper=workspace.upper_path, work=workspace.work_path))
    overlay.names.rename(overlay.root, old, overlay.root, new)
    overlay.close()
