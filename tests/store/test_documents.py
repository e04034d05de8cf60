"""Manifests, attestations, locks and objects.toml: what is written is read back, everything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpstore.errors import BadManifest
from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry, Lockfile
from vpstore.schema.manifest import (
    BuildRecord,
    FileRecord,
    InputRecord,
    IntermediateRecord,
    Manifest,
    Pin,
    RecipeFile,
    SourceRecord,
    Variable,
)
from vpstore.schema.record import key_of
from vpstore.schema.ref import StageRef
from vpstore.storage.pointers import Known, Pointer, decode_known, encode_known

digests = st.binary(min_size=1, max_size=8).map(Digest.of)
path_names = st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6})?", fullmatch=True)


def unique_by_name(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    # the first parts differ, so that no file is also a folder
    return st.lists(rows, max_size=4, unique_by=lambda row: row[0].split("/")[0]).map(tuple)


records = st.builds(
    BuildRecord,
    entry=st.just("small.grow"),
    recipe_files=unique_by_name(st.builds(RecipeFile, path_names, digests, digests)),
    params=st.dictionaries(
        path_names, st.integers(0, 9) | st.floats(0, 1) | st.lists(st.text("ab"), max_size=2), max_size=3
    ),
    inputs=unique_by_name(
        st.builds(InputRecord, path_names, digests, digests, st.sampled_from(["content", "artifact"]))
    ),
    sources=unique_by_name(st.builds(SourceRecord, path_names, st.just("0" * 64), st.none() | st.integers(0, 9))),
    pins=unique_by_name(st.builds(Pin, path_names, digests, st.dictionaries(path_names, st.floats(0, 1), max_size=2))),
    variables=unique_by_name(st.builds(Variable, path_names, st.text("ab", max_size=2))),
)
file_lists = st.lists(
    st.builds(FileRecord, path_names, st.just("text/plain"), digests, st.integers(0, 9), st.none() | digests),
    max_size=4,
    unique_by=lambda row: row.path.split("/")[0],
)
manifests = st.builds(
    Manifest,
    st.just("plant"),
    st.just("bloom"),
    records,
    file_lists.map(tuple),
    unique_by_name(st.builds(IntermediateRecord, path_names, digests, st.integers(0, 9))),
    st.booleans(),
)


@given(manifests)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    again = Manifest.decode(manifest.encoded, where="test")
    assert again == manifest
    assert again.digest == Digest.of(manifest.encoded)
    assert again.build.key() == manifest.build.key() == key_of(json.loads(manifest.encoded)["build"])


@given(manifests, st.randoms())
def test_one_artifact_has_one_manifest_whatever_the_order(manifest: Manifest, random: Any) -> None:
    files = list(manifest.files)
    random.shuffle(files)
    shuffled = Manifest("plant", "bloom", manifest.build, tuple(files), manifest.intermediates, manifest.verbatim)
    assert (shuffled.digest, shuffled.content) == (manifest.digest, manifest.content)


def example() -> Manifest:
    record = BuildRecord(
        "small.grow",
        tuple(
            RecipeFile(f"small/{name}.py", Digest.of(name.encode()), Digest.of(b"code")) for name in ("grow", "soil")
        ),
        {"step": 1, "rate": 0.5},
        (InputRecord("parent", Digest.of(b"parent"), Digest.of(b"content")),),
        (SourceRecord("donor/a", "1" * 64, None),),
        (Pin("tokenizer", Digest.of(b"ranks"), {"family": "o200k", "padded_vocab": 201088}),),
        (Variable("DEVICE", "cpu"),),
    )
    files = (
        FileRecord("model.safetensors", "application/vnd.safetensors", Digest.of(b"m"), 3, Digest.of(b"t")),
        FileRecord("config.json", "application/json", Digest.of(b"c"), 2),
    )
    return Manifest("plant", "bloom", record, files, (IntermediateRecord("mean", Digest.of(b"i"), 1),))


def test_the_golden_digests() -> None:
    """What identity is made of may only change with `format`: these figures are fixed for ever."""
    for manifest, (key, artifact) in ((example(), SECOND), (first_example(), FIRST)):
        assert manifest.build.key() == key
        assert manifest.digest == artifact
        plain = json.dumps(json.loads(manifest.encoded), sort_keys=True, separators=(",", ":"))
        assert Digest.of(plain.encode()) == artifact  # for ASCII and short numbers RFC 8785 is what anybody would write
        assert Manifest.decode(manifest.encoded, where="test") == manifest


def first_example() -> Manifest:
    """The example as the first format had it: code by its bytes, parents by their artifacts, no content."""
    new = example()
    files = tuple(RecipeFile(row.path, row.digest) for row in new.build.recipe_files)
    inputs = tuple(InputRecord(row.role, row.artifact) for row in new.build.inputs)
    build = replace(new.build, recipe_files=files, inputs=inputs, variables=(), format=1)
    return replace(new, build=build, verbatim=True)


FIRST = (
    "blake3:7c78a1b85ba95492c38e4889492a6dadb5326f914bdd81d01fcb3dbaa41e7301",
    "blake3:2015904301ce35b1d98584f014144438bc2b5da8a2aac162d00664b5b2151e92",
)
SECOND = (
    "blake3:04f3d5c2dafbd048b19599eca55cd2f0687e9931a61789b7014969bfeac75edb",
    "blake3:11b739fbd9fc76776309f36216869464be9e30dee444c5ec15b96877db0c159e",
)


def change(document: Any, path: list[Any], value: Any) -> bytes:
    here = document
    for part in path[:-1]:
        here = here[part]
    if value is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return canonical_bytes(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], 3),
        (["format"], 1),  # with the fields of the second
        (["format"], ...),
        (["content"], "blake3:" + "0" * 64),
        (["verbatim"], "no"),
        (["format"], True),
        (["note"], "x"),
        (["object"], "a/b"),
        (["stage"], ""),
        (["files", 0, "path"], "../up"),
        (["files", 0, "path"], "artifact.json"),
        (["files", 0, "path"], "MODEL.safetensors"),
        (["files", 0, "path"], "zzz"),  # no longer sorted
        (["files", 0, "path"], "model.safetensors"),
        (["files", 0, "size_bytes"], -1),
        (["files", 0, "size_bytes"], "2"),
        (["files", 0, "digest"], "blake3:1"),
        (["files", 0, "tensors"], 5),
        (["files", 0], "x"),
        (["files"], {}),
        (["build", "params"], []),
        (["build", "recipe", "files", 0, "path"], "/abs"),
        (["build", "recipe", "entry"], ""),
        (["build", "inputs", 0, "role"], ".."),
        (["build", "sources", 0, "sha256"], "1" * 63),
        (["build", "format"], 1),
        (["build", "params", "rate"], 0.5),  # a float that does not stand as itself
        (["build", "params", "rate"], {"$float": "0.50"}),
        (["build", "params", "rate"], {"$float": "nan"}),
        (["build", "params", "rate"], {"$int": "7"}),  # small enough to stand as itself
        (["build", "params", "rate"], {"$date": "today"}),
        (["build", "inputs", 0, "by"], "name"),
        (["build", "inputs", 0, "content"], ...),
        (["build", "recipe", "files", 0, "code"], ...),
        (["build", "pins", 0, "extra"], 1),
        (["build", "pins", 0, "attributes", "padded_vocab"], 1.5),
        (["intermediates", 0, "name"], "/x"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(path: list[Any], value: Any) -> None:
    with pytest.raises(BadManifest):
        Manifest.decode(change(json.loads(example().encoded), path, value), where="test")


def test_every_part_of_a_build_that_decides_bytes_is_in_its_key_and_no_other() -> None:
    base = example().build
    keys = {base.key()}
    changes: list[tuple[list[Any], Any]] = [
        (["recipe", "entry"], "small.other"),
        (["recipe", "files", 0, "code"], Digest.of(b"x")),
        (["recipe", "files", 0, "path"], "small/glow.py"),
        (["params", "step"], 2),
        (["params", "step"], {"$float": "1.0"}),
        (["params", "new"], None),
        (["inputs", 0, "content"], Digest.of(b"y")),
        (["inputs", 0, "by"], "artifact"),
        (["inputs", 0, "role"], "other"),
        (["sources", 0, "sha256"], "2" * 64),
        (["sources", 0, "size_bytes"], 7),
        (["pins"], []),
        (["pins", 0, "attributes", "family"], "qwen"),
        (["environment"], []),
        (["environment", 0, "value"], "cuda"),
    ]
    for path, value in changes:
        keys.add(key_of(json.loads(change(json.loads(canonical_bytes(base.to_json())), path, value))))
    assert len(keys) == len(changes) + 1
    for path in (["recipe", "files", 0, "digest"], ["inputs", 0, "artifact"]):  # comments, and history
        data = change(json.loads(canonical_bytes(base.to_json())), path, Digest.of(b"z"))
        assert key_of(json.loads(data)) == base.key()


def test_content_is_what_a_child_can_see() -> None:
    own = example()
    written = FileRecord("provenance.json", "application/json", Digest.of(b"history"), 9)
    with_history = replace(own, files=(*own.files, written))
    assert with_history.content == own.content != replace(with_history, verbatim=True).content
    assert with_history.digest != own.digest
    for changed in ({"path": "other.json"}, {"digest": Digest.of(b"x")}, {"size_bytes": 7}):
        assert replace(own, files=(replace(own.files[0], **changed), own.files[1])).content != own.content  # type: ignore[arg-type]
    assert replace(own, files=(replace(own.files[0], media_type="text/plain"), own.files[1])).content == own.content


FACTS = BuildFacts(
    "2026-01-01T00:00:00Z",
    "2026-01-01T00:00:02Z",
    1767225602,
    2.5,
    {"torch": "2.11"},
    {"commit": None, "dirty": None},
    {"vpstore": "0"},
)


def test_a_statement_comes_back_and_names_what_was_used() -> None:
    statement = Statement.of(example(), FACTS)
    again = Statement.decode(statement.encode(), where="test")
    assert again == statement
    assert (again.artifact, again.key, again.facts) == (example().digest, example().build.key(), FACTS)
    names = {row["name"] for row in again.document["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"input/parent", "recipe/small/grow.py", "source/donor/a", "pin/tokenizer", "config/params"} <= names


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["_type"], "x"),
        (["predicateType"], "x"),
        (["subject"], []),
        (["subject", 0, "digest"], {}),
        (["subject", 0, "digest", "blake3"], "x"),
        (["predicate", "runDetails"], ...),
        (["predicate", "runDetails", "metadata", "durationSeconds"], "2"),
        (["predicate", "buildDefinition", "internalParameters", "environment"], {"a": 1}),
        (["predicate", "buildDefinition", "externalParameters", "build_key"], ...),
    ],
)
def test_a_statement_that_is_not_one_is_refused(path: list[Any], value: Any) -> None:
    with pytest.raises(BadManifest):
        Statement.decode(change(json.loads(Statement.of(example(), FACTS).encode()), path, value), where="test")


def test_a_lock_comes_back_sorted() -> None:
    entry = LockEntry.of(example())
    refs = [StageRef("b", "x"), StageRef("a", "y")]
    lock = Lockfile().with_profile("tiny", {ref: entry for ref in refs})
    data = lock.encode()
    assert Lockfile.decode(data, where="test") == lock
    assert Lockfile().with_profile("tiny", {ref: entry for ref in reversed(refs)}).encode() == data
    assert lock.entry("tiny", refs[0]) == entry
    assert lock.entry("large", refs[0]) is None
    assert lock.with_profile("large", {}).entry("tiny", refs[1]) == entry


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format":1}', '{"format":3,"profiles":{}}', '{"format":1,"profiles":{"t":{"a":{}}}}',
     '{"format":1,"profiles":{"t":{"a@b":{}}}}', '{"format":1,"profiles":{"t":[]}}',
     '{"format":1,"profiles":{},"x":1}'],
)  # fmt: skip
def test_a_lock_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(BadManifest):
        Lockfile.decode(text.encode(), where="test")


def test_a_pointer_comes_back() -> None:
    first = Pointer(StageRef("plant", "bloom"), Digest.of(b"a"), Digest.of(b"k"))
    assert Pointer.decode(first.encode(), where="test") == first  # the first format has the artifact itself
    pointer = Pointer(first.ref, first.artifact, first.key, Digest.of(b"c"))
    known = [Known(Digest.of(b"b"), Digest.of(b"c"), Digest.of(b"l")), Known.of(pointer)]
    rows = decode_known(encode_known([row for row in known if row is not None]), where="test")
    assert Pointer.decode(pointer.encode(), where="test", artifacts=rows) == pointer
    assert pointer.artifact not in pointer.encode().decode()
    with pytest.raises(BadManifest, match="which artifact"):
        Pointer.decode(pointer.encode(), where="test", artifacts=rows[:1])


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_by_every_parser(data: bytes) -> None:
    for parse in (Manifest.decode, Statement.decode, Pointer.decode, Lockfile.decode):
        with pytest.raises(BadManifest):
            parse(data, where="test")
