"""provenance.json can be derived again from the manifest, byte for byte, whatever kind of numbers the params had."""

from __future__ import annotations

from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, Manifest, RecipeFile


def test_whole_floats_survive_the_way_through_the_manifest() -> None:
    code = (RecipeFile("recipes/x.py", Digest.of(b"text"), Digest.of(b"code")),)
    record = BuildRecord("recipes.x", code, {"rate": 1.0, "deep": [{"base": 1e6}], "small": 1e-3, "count": 3})
    manifest = Manifest("x", "main", record, ())
    again = Manifest.decode(manifest.encoded, where="manifest").build
    assert again.readable() == record.readable()
    assert again.key() == record.key()
