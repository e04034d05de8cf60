"""The depth map: its golden, its conditions, and whom inserted layers copy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.ops.depth import depth_map, inserted_layers, require_valid_map, source_layers
from vpstore.errors import RecipeRefused

GOLDEN_28_TO_80 = (
    1, 5, 9, 12, 13, 17, 21, 24, 25, 29, 33, 36, 37, 39, 42, 44, 45, 49, 53, 56, 57, 61, 65, 68, 69, 73, 77, 80,
)  # fmt: skip
BLOCKS = st.tuples(st.integers(1, 24), st.integers(0, 40)).map(lambda pair: (4 * pair[0], 4 * (pair[0] + pair[1])))


def refused(places: tuple[int, ...], old: int, new: int) -> str:
    with pytest.raises(RecipeRefused) as caught:
        require_valid_map(places, old_layers=old, new_layers=new, global_every=4)
    return caught.value.what


def test_28_to_80_is_the_published_map() -> None:
    assert depth_map(28, 80, global_every=4) == GOLDEN_28_TO_80


def test_inserted_counts_of_28_to_80() -> None:
    inserted = inserted_layers(GOLDEN_28_TO_80, 80)
    assert (len(inserted), sum(layer % 4 == 0 for layer in inserted)) == (52, 13)


def test_4_to_12() -> None:
    assert depth_map(4, 12, global_every=4) == (1, 5, 9, 12)
    assert inserted_layers((1, 5, 9, 12), 12) == (2, 3, 4, 6, 7, 8, 10, 11)


@settings(deadline=None)
@given(BLOCKS)
def test_every_map_is_valid_and_keeps_both_ends(depths: tuple[int, int]) -> None:
    old, new = depths
    places = depth_map(old, new, global_every=4)
    require_valid_map(places, old_layers=old, new_layers=new, global_every=4)
    assert places[0] == 1
    assert places[-1] == new


@settings(deadline=None)
@given(st.integers(1, 30))
def test_the_same_depth_moves_nothing(blocks: int) -> None:
    assert depth_map(4 * blocks, 4 * blocks, global_every=4) == tuple(range(1, 4 * blocks + 1))


@settings(deadline=None)
@given(BLOCKS)
def test_old_globals_are_spread_evenly(depths: tuple[int, int]) -> None:
    old, new = depths
    globals_ = [place // 4 for place in depth_map(old, new, global_every=4) if place % 4 == 0]
    few, many = old // 4, new // 4  # at most half a block from where even steps would lead, in whole numbers
    assert all(2 * abs(place * few - number * many) <= few for number, place in enumerate(globals_, start=1))


@pytest.mark.parametrize(("old", "new"), [(27, 80), (28, 79), (28, 24), (0, 4), (-4, 4)])
def test_depths_without_a_map_are_refused(old: int, new: int) -> None:
    with pytest.raises(RecipeRefused, match="no role-preserving map"):
        depth_map(old, new, global_every=4)


def test_uniform_spacing_is_refused_by_role() -> None:
    uniform = tuple(1 + (79 * i) // 27 for i in range(28))
    assert "keeps its role" in refused(uniform, 28, 80)


def test_layer_one_must_stay() -> None:
    assert "m(1) = 1" in refused((2, *GOLDEN_28_TO_80[1:]), 28, 80)


def test_prepending_is_refused_and_appending_is_not() -> None:
    assert "m(1) = 1" in refused(tuple(range(53, 81)), 28, 80)
    require_valid_map(tuple(range(1, 29)), old_layers=28, new_layers=80, global_every=4)


@pytest.mark.parametrize(
    ("places", "condition"),
    [
        ((1, 5, 9), "one place for each old layer"),
        ((1, 5, 9, 16), "every place within 1..12"),
        ((1, 5, 5, 12), "strictly increasing"),
        ((1, 9, 5, 12), "strictly increasing"),
        ((1, 5, 9, 11), "keeps its role"),
        ((1, 4, 9, 12), "keeps its role"),
    ],
)
def test_a_broken_map_names_its_condition(places: tuple[int, ...], condition: str) -> None:
    assert condition in refused(places, 4, 12)


@settings(deadline=None)
@given(BLOCKS)
def test_sources_against_a_slow_search(depths: tuple[int, int]) -> None:
    old, new = depths
    places = depth_map(old, new, global_every=4)
    sources = source_layers(places, new, global_every=4)
    for layer in range(1, new + 1):
        best = None
        for candidate in range(1, old + 1):
            if (candidate % 4 == 0) != (layer % 4 == 0):
                continue
            distance = abs(places[candidate - 1] - layer)
            if best is None or distance < best[0]:
                best = (distance, candidate)
        assert best is not None
        assert sources[layer - 1] == best[1]
    assert all(sources[place - 1] == layer for layer, place in enumerate(places, start=1))


def test_sources_of_4_to_12_with_their_ties() -> None:
    # Places 3 and 7 are as far from one old local as from the next: the lower one is copied.
    assert source_layers((1, 5, 9, 12), 12, global_every=4) == (1, 1, 1, 4, 2, 2, 2, 4, 3, 3, 3, 4)


def test_a_role_nobody_has_cannot_be_inserted() -> None:
    with pytest.raises(RecipeRefused, match="nothing to copy"):
        source_layers((1, 2, 3), 4, global_every=4)
