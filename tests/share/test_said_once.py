"""What push, pull, repair and resolve say of remotes and digests: once, and so that it can be told apart."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from damage_tools import flip
from two_checkouts import Pair, artifact_of, remote_blob, store_of

from vpstore.schema.digest import Digest, apart
from vpstore.storage.atomic import temporary_name
from vpstore.storage.refusals import as_error


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
    content = document["profiles"]["tiny"]["plant@bloom"]["content"]
    lock.write_text(lock.read_text().replace(artifact, other).replace(content, first))
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


def test_a_lock_that_names_another_stage_is_what_is_wrong(pair: Pair) -> None:
    """Everything is whole: neither verify nor repair would find anything."""
    lock = pair.b.root / "vpstore.lock"
    document = json.loads(lock.read_text())
    entries = document["profiles"]["tiny"]
    entries["plant@bloom"] = entries["plant@sprout"]
    lock.write_text(json.dumps(document, indent=2) + "\n")
    (failure,) = [row for row in pair.b.json("pull", code=14)["failures"] if row["exit_code"] == 14]
    assert "another object or stage" in failure["what"]
    assert "the lock's entry of plant@bloom is wrong" in failure["next_step"]
    assert "verify" not in failure["next_step"]
    error = pair.b.json("resolve", "plant@bloom", code=14)["error"]
    assert "the lock is wrong" in error["next_step"]
    assert "verify" not in error["next_step"]


def test_a_pointer_to_another_stage_is_written_anew_by_a_build(pair: Pair) -> None:
    pointer = pair.a.pointed("plant-bloom")
    pointer["artifact"] = artifact_of(pair.a, "plant@sprout")
    pair.a.pointer("plant-bloom").write_text(json.dumps(pointer))
    for command in (["repair", "plant@bloom"], ["resolve", "plant@bloom"], ["push", "plant@bloom"]):
        document = pair.a.json(*command, code=14)
        row = document["error"] if "error" in document else document["failures"][0]
        assert row["next_step"].startswith("vpstore build plant@bloom writes")
    pair.a.run("build", "plant@bloom")
    pair.a.run("resolve", "plant@bloom")


def test_a_broken_lock_is_no_broken_pointer(pair: Pair) -> None:
    pair.a.root.joinpath("vpstore.lock").write_text("{")
    (fault,) = pair.a.json("verify", "plant", code=3)["faults"]
    assert fault["where"].endswith("vpstore.lock")
    assert fault["expected"] == "a sound lock"


def test_push_counts_only_what_went_over_as_not_agreed(pair: Pair) -> None:
    plant = pair.a.root / "configs" / "plant.toml"
    plant.write_text("[sprout]\nstep = 1\n[bloom]\nstep = 7\n")
    pair.a.run("build", "plant@bloom")
    view = Path(pair.a.json("resolve", "plant")["path"])
    flip((view / "model.safetensors").resolve(), 60)
    done = pair.a.run("push", "plant@bloom", code=13)
    assert "incomplete: plant@bloom" in done.stdout
    assert "not what vpstore.lock says" not in done.stderr
    pair.a.run("build", "plant@bloom", "--force")
    assert "1 of what is sent is not what vpstore.lock says (plant@bloom)" in pair.a.run("push", "plant@bloom").stderr


def test_a_refusal_names_the_folder_and_no_name_that_nobody_has_seen(pair: Pair) -> None:
    tmp = pair.a.store / "tmp"
    shutil.rmtree(tmp)
    tmp.write_text("a file")
    pair.a.pointer("plant-bloom").unlink()
    error = pair.a.json("build", "plant@bloom", "--force", code=1)["error"]
    assert error["where"] == str(tmp)
    made_up = str(temporary_name(tmp))
    for refused, where in (
        (PermissionError(errno.EACCES, "", made_up), tmp),
        (PermissionError(errno.EACCES, "", made_up, None, "/store/blobs/ab/cd"), "/store/blobs/ab/cd"),
        (PermissionError(errno.EACCES, "", f"/views/.{Path(made_up).name}/reports/metrics.json"), "/views"),
        (PermissionError(errno.EACCES, "", "/store/blobs"), "/store/blobs"),
    ):
        told = as_error(refused, "", "working")
        assert told is not None
        assert told.where == str(where)
