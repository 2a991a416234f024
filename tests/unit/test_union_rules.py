"""The rules of a stack: one name, and a whole listing, on every small stack and on random large ones."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.union.merge import fold, merge
from overlayfs.union.resolve import Kind, resolve

ABSENT, WHITEOUT, FILE, DIR, OPAQUE = Kind.ABSENT, Kind.WHITEOUT, Kind.FILE, Kind.DIR, Kind.OPAQUE

names = st.sampled_from([b"a", b"b", b"c", b"\xff", b"d" * 255])
listings = st.lists(st.dictionaries(names, st.sampled_from(Kind)), max_size=8)


@pytest.mark.parametrize(
    ("kinds", "visible"),
    [
        ([], ()),
        ([ABSENT, ABSENT], ()),
        ([FILE, FILE], (0,)),
        ([ABSENT, FILE, DIR], (1,)),
        ([WHITEOUT, FILE], ()),
        ([DIR, ABSENT, DIR, DIR], (0, 2, 3)),
        ([DIR, WHITEOUT, DIR], (0,)),
        ([DIR, FILE, DIR], (0,)),
        ([DIR, OPAQUE, DIR], (0, 1)),
        ([OPAQUE, DIR], (0,)),
        ([ABSENT, WHITEOUT], ()),
    ],
)
def test_resolve(kinds: list[Kind], visible: tuple[int, ...]) -> None:
    assert resolve(kinds) == visible


def test_resolve_asks_no_layer_below_the_deciding_one() -> None:
    rest = iter([DIR, WHITEOUT, FILE, DIR])
    assert resolve(rest) == (0,)
    assert list(rest) == [FILE, DIR]


def _law(stack: list[dict[bytes, Kind]]) -> None:
    merged = merge(stack)
    for name in {name for listing in stack for name in listing}:
        visible = resolve(listing.get(name, ABSENT) for listing in stack)
        assert (name in merged) == (visible != ())
        assert merged.get(name, ()) == visible
    assert set(merged) <= {name for listing in stack for name in listing}


def test_a_name_is_listed_exactly_when_it_resolves_on_every_small_stack() -> None:
    stacks = [kinds for depth in range(5) for kinds in product(Kind, repeat=depth)]
    assert len(stacks) == 781
    for kinds in stacks:
        _law([{b"n": kind} for kind in kinds])


@given(listings)
def test_a_name_is_listed_exactly_when_it_resolves(stack: list[dict[bytes, Kind]]) -> None:
    _law(stack)


@given(st.lists(st.sampled_from(Kind), max_size=12))
def test_what_resolves(kinds: list[Kind]) -> None:
    visible = resolve(kinds)
    assert list(visible) == sorted(set(visible))
    shown = [kinds[position] for position in visible]
    assert all(kind in (FILE, DIR, OPAQUE) for kind in shown)
    assert all(kind is DIR for kind in shown[:-1]), "only directories merge with what is below them"


@given(listings, st.integers(0, 8))
def test_a_layer_of_whiteouts_hides_all_below_and_nothing_above(stack: list[dict[bytes, Kind]], at: int) -> None:
    everything = {name: WHITEOUT for listing in stack for name in listing}
    assert merge([*stack[:at], everything, *stack[at:]]) == merge(stack[:at])


@given(listings)
def test_listings_may_be_made_one_at_a_time(stack: list[dict[bytes, Kind]]) -> None:
    assert merge(listing for listing in stack) == merge(stack)


def test_names_keep_the_order_of_first_appearance() -> None:
    assert list(merge([{b"z": FILE, b"b": DIR}, {b"a": FILE, b"b": DIR}])) == [b"z", b"b", b"a"]


def test_five_hundred_layers() -> None:
    merged = merge([{b"common": DIR, b"own%d" % position: FILE} for position in range(500)])
    assert merged[b"common"] == tuple(range(500))
    assert len(merged) == 501


def _fold_law(stack: list[dict[bytes, Kind]]) -> None:
    """Folding in one listing yields the names of `merge` in the same order, and its positions first."""
    whole = merge(stack)
    folded = fold(stack[0], merge(stack[1:]))
    assert list(folded) == list(whole)
    for name, positions in whole.items():
        assert folded[name][: len(positions)] == positions
        assert len(folded[name]) == len(positions) or stack[0].get(name) is DIR


def test_folding_agrees_with_merging_on_every_small_stack() -> None:
    for depth in range(1, 5):
        for kinds in product(Kind, repeat=depth):
            _fold_law([{b"n": kind} for kind in kinds])


@given(listings.filter(bool))
def test_folding_agrees_with_merging(stack: list[dict[bytes, Kind]]) -> None:
    _fold_law(stack)
