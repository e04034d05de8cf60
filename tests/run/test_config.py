from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from recipes import config
from recipes.params.base import ParamsBase
from recipes.params.runtime_table import Runtime
from vpstore.errors import UsageError


class _Inner(ParamsBase):
    hidden_size: int


class _Params(ParamsBase):
    model: _Inner
    rate: float
    layers: tuple[int, ...] = ()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> config.Place:
    module = types.ModuleType("recipes.params.invented")
    module.Params = _Params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recipes.params.invented", module)
    return config.Place("thing", "convert", "compat", "recipes.invented", ("thing.toml",))


def _params(root: Path, text: str, profile: dict[str, object], place: config.Place) -> ParamsBase:
    (root / "thing.toml").write_text(text)
    return config.stage_params(root, profile=profile, place=place)


PROFILE = {"params": {"thing": {"compat": {"model": {"hidden_size": 64}, "convert": {"layers": [1, 2]}}}}}


def test_object_and_profile_make_one_typed_value(tmp_path: Path, place: config.Place) -> None:
    found = _params(tmp_path, "[convert]\nrate = 1\n", PROFILE, place)
    assert found == _Params(model=_Inner(hidden_size=64), rate=1.0, layers=(1, 2))


def test_comments_and_order_change_nothing(tmp_path: Path, place: config.Place) -> None:
    profile = {"params": {"thing": {"compat": {"model": {"hidden_size": 64}}}}}
    one = _params(tmp_path, "[convert]\nrate = 0.5\nlayers = [3]\n", profile, place)
    two = _params(tmp_path, "# why\n[convert]\nlayers = [ 3 ] # three\nrate = 5e-1\n", profile, place)
    assert one.model_dump(mode="json") == two.model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[convert]\nrate = 1.0\nrat = 2\n", "rat"),
        ("[convert]\nrate = '1.0'\n", "rate"),
        ("[convert]\nlayers = [1]\nrate = 1.0\n", "profile's"),
        ("[model]\nhidden_size = 32\n[convert]\nrate = 1.0\n", "profile's"),
        ("[convert\n", "not TOML"),
        ("", "rate"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, place: config.Place, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        _params(tmp_path, text, PROFILE, place)
    assert caught.value.exit_code == 2
    assert caught.value.next_step


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(tmp_path: Path, place: config.Place) -> None:
    with pytest.raises(UsageError) as caught:
        _params(tmp_path, "[convert]\nrte = 1.0\n", PROFILE, place)
    assert caught.value.where.endswith("rte")
    assert "and 1 more" in caught.value.expected


def test_missing_file_and_missing_params_class(tmp_path: Path, place: config.Place) -> None:
    with pytest.raises(UsageError, match="missing"):
        config.stage_params(tmp_path, profile={}, place=place)
    with pytest.raises(UsageError, match="no typed params"):
        config.params_model("recipes.unheard_of")


def test_misspelt_profile_tables_are_found() -> None:
    known = {"vpDense": {"real.expand", "real.model"}, "stage1": {"main"}}
    good = {"params": {"vpDense": {"real": {"expand": {"a": 1}}}, "stage1": {"main": {}}}}
    assert config.unknown_tables(good, known) == []
    bad = {"params": {"vpDense": {"real": {"expnd": {}}}, "stage2": {"main": {}}}}
    assert config.unknown_tables(bad, known) == ["params.vpDense.real", "params.stage2.main"]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"threads": 2, "rank": 2}, "rank"),
        ({"threads": 2, "ranks": 0}, "ranks"),
        ({"threads": True}, "threads"),
        ({"ranks": 2}, "threads"),
        ({"threads": 2, "ranks": "2"}, "ranks"),
    ],
)
def test_how_builds_run_is_typed_too(table: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.validated(Runtime, table, where="a.toml: [runtime]")
    assert caught.value.where == f"a.toml: [runtime] {key}"
    assert config.validated(Runtime, {"threads": 2}, where="").model_dump() == {"threads": 2, "ranks": 1}
