"""Every parser of bytes from outside refuses with an error of ours, or gives back exactly what it was given."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import HOSTILE, mutate
from parsers import Parser, Violation, hold, parsers

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical

NAMES = [
    "manifest", "tensor table", "safetensors header", "attestation", "reproduction", "envelope", "signed statement",
    "pointer", "lock", "key", "root of a checkout", "objects.toml", "ref", "strict JSON", "canonical JSON",
]  # fmt: skip


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return {parser.name: parser for parser in parsers(tmp_path_factory.mktemp("parsers"))}


def test_every_parser_is_here_and_reads_its_samples(by_name: dict[str, Parser]) -> None:
    assert sorted(by_name) == sorted(NAMES)
    for parser in by_name.values():
        assert all(hold(parser, sample) for sample in parser.samples) == (parser.name != "key")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_a_mutated_document_is_refused_or_given_back(by_name: dict[str, Parser], name: str, random: Random) -> None:
    parser = by_name[name]
    hold(parser, mutate(random.choice(parser.samples), random, is_json=parser.is_json))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_many_mutated_documents_are_refused_or_given_back(by_name: dict[str, Parser], name: str) -> None:
    parser = by_name[name]
    taken = 0
    for seed in range(20_000):
        random = Random(seed)
        taken += hold(parser, mutate(random.choice(parser.samples), random, is_json=parser.is_json))
    assert taken > 0 or name == "key"  # the mutations are mild enough to be accepted now and then


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.text(max_size=80).map(str.encode))
def test_noise_is_refused(by_name: dict[str, Parser], data: bytes) -> None:
    for parser in by_name.values():
        if parser.name not in ("ref", "objects.toml", "strict JSON", "canonical JSON"):
            assert not hold(parser, data)
        else:
            hold(parser, data)


numbers = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(values)
def test_canonical_bytes_are_the_reference_implementations(value: Any) -> None:
    data = canonical_bytes(value)
    assert data == rfc8785.dumps(value)
    assert canonical_bytes(parse_canonical(data, where="test")) == data


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_written_as_the_reference_implementation_does(value: float) -> None:
    assert canonical_bytes(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [v for v in HOSTILE if not isinstance(v, (list, dict))], ids=lambda v: repr(v)[:30])
def test_a_hostile_value_is_written_as_the_reference_does_or_refused(value: Any) -> None:
    try:
        expected = rfc8785.dumps({"x": value})
    except (rfc8785.CanonicalizationError, UnicodeError):
        with pytest.raises(BadManifest):
            canonical_bytes({"x": value})
    else:
        assert canonical_bytes({"x": value}) == expected


@pytest.mark.parametrize("broken", ["crash", "other", "takes all"])
def test_a_broken_parser_is_noticed(broken: str) -> None:
    """Negative controls of the fuzzer itself."""
    sample = canonical_bytes({"a": 1})

    def again(data: bytes) -> bytes:
        value = json.loads(data)
        if broken == "crash":
            return canonical_bytes({"a": value["a"] + 1 - 1})
        return canonical_bytes(value) if broken == "other" else b"{}"

    parser = Parser("broken", (sample,), again)
    documents = [mutate(sample, Random(seed), is_json=True) for seed in range(500)]
    with pytest.raises(Violation):
        _ = [hold(parser, data) for data in documents]
