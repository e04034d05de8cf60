"""What push, pull, repair and resolve say of remotes and digests: once, and so that it can be told apart."""

from __future__ import annotations

import json

import pytest
from damage_tools import flip
from two_checkouts import Pair, artifact_of, remote_blob, store_of

from vpstore.schema.digest import Digest, apart


@pytest.mark.parametrize("there", ["nothing", "a file"])
def test_a_directory_that_is_absent_is_no_empty_remote(pair: Pair, there: str) -> None:
    """A share that is not mounted; as with a bucket that is not there, only push may make it."""
    place = pair.folder / "elsewhere"
    config = pair.a.root / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"far\"']\n    url = {place}\n")
    if there == "a file":
        place.write_text("a plain file")
    for command in (["pull", "-r", "far"], ["verify", "--remote", "-r", "far"], ["repair", "--from", "far"]):
        error = pair.a.json(*command, code=16)["error"]
        assert error["what"] == "the remote's directory is absent"
        assert "mount it" in error["next_step"]
    pair.a.run("push", "-r", "far", code=0 if there == "nothing" else 16)
    assert (place / "vpstore" / "keys").is_dir() == (there == "nothing")


def test_one_damaged_manifest_on_the_remote_is_said_once(pair: Pair) -> None:
    """Though it is asked for, and an ancestor of something else that is."""
    flip(remote_blob(pair, artifact_of(pair.a, "plant@sprout")), 50)
    done = pair.b.json("pull", code=13)
    assert len(done["failures"]) == 1
    names = [row["ref"] for row in done["artifacts"]]
    assert len(names) == len(set(names))


def test_one_damaged_manifest_here_is_said_once_by_push(pair: Pair) -> None:
    flip(pair.a.blob(artifact_of(pair.a, "plant@sprout")), 50)
    assert len(pair.a.json("push", code=13)["failures"]) == 1


def test_a_damaged_blob_does_not_say_that_nothing_went_over(pair: Pair) -> None:
    shard = store_of(pair.a).manifest(artifact_of(pair.a, "plant@bloom")).by_path["model.safetensors"].digest
    flip(pair.a.blob(shard), 60)
    remote_blob(pair, shard).unlink()
    error = pair.a.run("push", code=13).stderr
    assert "this blob was not uploaded" in error
    assert "nothing was uploaded" not in error


def test_digests_are_shown_as_long_as_it_takes_to_tell_them_apart(pair: Pair) -> None:
    first = Digest("blake3:" + "ab" * 32)
    assert apart(first, Digest("blake3:" + "cd" * 32)) == ("ab" * 6, "cd" * 6)
    assert apart(first, Digest(first[:-1] + "c")) == (first.hex, first.hex[:-1] + "c")
    assert apart(first, Digest(first[:20] + "00" + first[22:])) == ("ab" * 8, "ab" * 6 + "a00b")
    lock = pair.a.root / "vpstore.lock"
    document = json.loads(lock.read_text())
    artifact = document["profiles"]["tiny"]["plant@bloom"]["artifact"]
    other = artifact[:30] + ("0" if artifact[30] != "0" else "1") + artifact[31:]
    lock.write_text(lock.read_text().replace(artifact, other))
    warning = pair.a.run("resolve", "plant").stderr
    assert f"plant@bloom is {artifact[7:31]}, the lock says {other[7:31]}" in warning


def test_a_damaged_manifest_is_no_namesake(pair: Pair) -> None:
    """Neither where a few digits are given, nor where it stands beside the one that is meant."""
    store = store_of(pair.a)
    bloom, sprout = (artifact_of(pair.a, ref) for ref in ("plant@bloom", "plant@sprout"))
    flip(pair.a.blob(sprout), 50)
    beside = store.attestations.root / (bloom.hex[:40] + "0" * 24)  # what attests a manifest that is not here
    beside.mkdir()
    for command, code in ((["resolve"], 0), (["audit"], 3), (["push"], 13)):  # these two look at its parent
        assert "no artifact has this digest prefix" in pair.a.run(*command, f"plant#{sprout.hex[:12]}", code=11).stderr
        pair.a.run(*command, f"plant#{bloom.hex[:12]}", code=code)
    assert "does not match" in pair.a.run("resolve", f"plant#{sprout.hex}", code=13).stderr
    rows = pair.a.json("repair", f"plant#{sprout.hex}")["objects"]
    assert [row["action"] for row in rows] == ["replaced"]
    pair.a.run("resolve", f"plant#{sprout.hex}")
