"""objects.toml and the profile: merged, typed, and refused when they make no sense."""

from __future__ import annotations

import tomllib

import pytest
from small_project import OBJECTS

from vpstore.errors import BadManifest, NoSuchRef, UsageError
from vpstore.schema.objects import Objects, parse_objects
from vpstore.schema.ref import StageRef, parse_ref


def objects(text: str = OBJECTS, profile: str = "") -> Objects:
    return parse_objects(tomllib.loads(text), tomllib.loads(profile), where="objects.toml")


def test_refs_find_their_stages() -> None:
    found = objects()
    cases = {
        "plant": "plant@bloom",
        "plant.green": "plant@sprout",
        "plant.red": "plant@bloom",
        "plant@sprout": "plant@sprout",
        "plant.green@sprout": "plant@sprout",
        "seed": "seed@main",
    }
    for text, expected in cases.items():
        assert str(found.find(parse_ref(text))) == expected
    assert [str(ref) for ref in found.targets(parse_ref("reports"))] == ["reports@plant-sprout", "reports@plant-bloom"]
    assert [str(ref) for ref in found.targets(parse_ref("plant"))] == ["plant@bloom"]
    assert str(found.stage(StageRef("plant", "bloom")).inputs["parent"]) == "plant@sprout"


@pytest.mark.parametrize("text", ["nothing", "plant@none", "plant.blue", "plant.green@bloom", "seed.green"])
def test_refs_to_nothing_are_refused(text: str) -> None:
    with pytest.raises(NoSuchRef):
        objects().find(parse_ref(text))


def test_the_order_has_parents_first() -> None:
    order = [str(ref) for ref in objects().order]
    assert order.index("seed@main") < order.index("plant@sprout") < order.index("plant@bloom")
    assert order.index("plant@bloom") < order.index("reports@plant-bloom")


def test_the_profile_adds_and_never_overrides() -> None:
    without = OBJECTS.replace('recipe = "small.seed"', "")
    profile = '[objects.seed.stages.main]\nrecipe = "small.other"\n[train]\nsteps = 5\n'
    assert objects(without, profile).stage(StageRef("seed", "main")).recipe == "small.other"
    with pytest.raises(UsageError, match="stands in objects.toml and in the profile") as caught:
        objects(OBJECTS, profile)
    assert "objects.seed.stages.main.recipe" in caught.value.where


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("format = 1", "format = 2", "format"),
        ('runner = "small.run"', "", "missing"),
        ('mode = "green"', 'mode = "green"\nspeed = 1', "unknown"),
        ('mode = "green"', "mode = 1", "type"),
        ('parent = "seed"', 'parent = "weed"', "no object"),
        ('parent = "seed"', 'parent = "seed@x"', "no stage"),
        ('parent = "seed"', 'parent = "seed#abcdef12"', "digest"),
        ('parent = "seed"', 'parent = "plant.red"', "circle"),
        ('parent = "seed"', "parent = 1", "not text"),
        ('default_stage = "bloom"', 'default_stage = "wilt"', "default stage"),
        ('donor = "configs/donor.json"', 'donor = "../donor.json"', "path"),
        ("[objects.seed]\n", "[objects.seed]\nnote = 1\n", "unknown"),
        ('recipe = "small.seed"', 'recipe = "small.seed"\ntokenizer = "t"', "tokenizer"),
        ("[objects.plant]\n", "[objects.'a b']\ndefault_stage='x'\nstages.x.recipe='r'\n[objects.plant]\n", "name"),
        ('key = "score"', "", "missing"),
    ],
)
def test_objects_that_make_no_sense_are_refused(old: str, new: str, what: str) -> None:
    assert old in OBJECTS
    with pytest.raises((UsageError, BadManifest), match=what):
        objects(OBJECTS.replace(old, new, 1))


def test_two_stages_may_not_share_a_pointer() -> None:
    text = OBJECTS + '[objects.plant-bloom]\ndefault_stage = "x"\n[objects.plant-bloom.stages.x]\nrecipe = "r"\n'
    objects(text)
    clash = OBJECTS.replace("plant-bloom", "x").replace("plant-sprout", "y")
    clash += '[objects.reports-x]\ndefault_stage = "z"\n[objects.reports-x.stages.z]\nrecipe = "r"\n'
    clash += '[objects.reports.stages.x-z]\nrecipe = "r"\n'
    with pytest.raises(UsageError, match="share a pointer"):
        objects(clash)
