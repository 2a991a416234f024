"""The real walk through layers against the documentation, on layers that are values; mutants of it fail."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.fs import search
from overlayfs.union.resolve import Kind, Resolution, resolve
from tests.support.fake_layers import ABSENT, NAMES, OBJECTS, Object, Stack, expected, shown

PLAIN = [each for each in OBJECTS if each == Object(each.kind)]
WAYS = list(product((False, True), repeat=2))  # with an upper or without, listed before or not

stacks = st.lists(st.fixed_dictionaries({name: st.sampled_from(OBJECTS) for name in NAMES}), min_size=2, max_size=4)


def _agree(stack: Stack) -> bool:
    return all(shown(stack, b"n", *way) == expected(stack, b"n") for way in WAYS)


@given(stacks)
def test_the_walk_finds_what_the_documentation_says(stack: Stack) -> None:
    for way in WAYS:
        assert shown(stack, b"n", *way) == expected(stack, b"n"), way


def test_the_walk_follows_the_rule_on_every_small_stack() -> None:
    for depth in (2, 3, 4):
        for objects in product(PLAIN, repeat=depth):
            stack = [{b"n": each} for each in objects]
            positions = tuple(position for position, _ in shown(stack, b"n", True, False).parts)
            assert positions == resolve(each.kind for each in objects)


_admits, _add, _visit, _add_file = Resolution.admits, Resolution.add, search._Walk._visit, search._Walk._add_file


def _stays_with_its_name(self: Any, layer: Any, hit: Any) -> bytes | None:
    wanted = _visit(self, layer, hit)
    return None if wanted is None else hit.wanted


def _looks_only_where_it_is_listed(self: Any, place: Any, marks: Any, wanted: bytes) -> bytes | None:
    onward = _add_file(self, place, marks, wanted)
    self._goes_for_data = False
    return onward


def _ends_with_the_first(self: Any, layer: Any, hit: Any) -> bytes | None:
    return None if _visit(self, layer, hit) is None or hit.entry.kind is not Kind.ABSENT else hit.wanted


MUTANTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "whiteouts hide nothing": lambda: mock.patch.object(
        Resolution, "admits", lambda self, kind: kind is Kind.WHITEOUT or _admits(self, kind)
    ),
    "a directory below a metadata-only file counts": lambda: mock.patch.object(
        Resolution, "admits", lambda self, kind: kind is Kind.DIR or _admits(self, kind)
    ),
    "opaque directories merge": lambda: mock.patch.object(
        Resolution, "add", lambda self, kind, metacopy=False: _add(self, kind, metacopy) or kind is Kind.OPAQUE
    ),
    "directories do not merge": lambda: mock.patch.object(
        Resolution, "add", lambda self, kind, metacopy=False: _add(self, kind, metacopy) and kind is Kind.FILE
    ),
    "data is where the metadata is": lambda: mock.patch.object(
        Resolution, "add", lambda self, kind, metacopy=False: _add(self, kind, False)
    ),
    "redirects lead nowhere": lambda: mock.patch.object(search._Walk, "_visit", _stays_with_its_name),
    "data is looked for only under listed names": lambda: mock.patch.object(
        search._Walk, "_add_file", _looks_only_where_it_is_listed
    ),
    "the first layer that has it ends the walk": lambda: mock.patch.object(
        search._Walk, "_visit", _ends_with_the_first
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_walk_are_noticed(name: str) -> None:
    random = Random(0)
    sample = [
        [{each: random.choice(OBJECTS) for each in NAMES} for _ in range(random.randint(2, 4))] for _ in range(1000)
    ]
    assert all(map(_agree, sample[:100])), "the walk itself is right"
    with MUTANTS[name]():
        assert not all(map(_agree, sample)), name


def test_what_is_absent_everywhere_is_not_found() -> None:
    assert not shown([{b"n": ABSENT}] * 4, b"n", True, True).parts
