"""repair of what is hard to see or to put away: behind a lost manifest, in ancestors, and where no file lies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_repair import Damage, blobs_of, flipped, gone
from two_checkouts import Pair, artifact_of, remote_blob, store_of

from vpstore.storage.remotes.base import blob_name


def forget_in_lock(pair: Pair, ref: str) -> None:
    path = pair.a.root / "vpstore.lock"
    document = json.loads(path.read_text())
    del document["profiles"]["tiny"][ref]
    path.write_text(json.dumps(document, indent=2) + "\n")


def test_what_is_lost_behind_a_lost_manifest_is_mended_too(pair: Pair) -> None:
    """An ancestor without manifest, a damaged one behind it, and one of which nothing is said any more."""
    store = store_of(pair.a)
    seed, sprout = (store.manifest(artifact_of(pair.a, ref)) for ref in ("seed@main", "plant@sprout"))
    sprout_key = store.keys.folder(sprout.build.key()) / sprout.digest.hex
    gone(pair.a.blob(sprout.digest))
    gone(sprout_key)
    gone(next(store.attestations.paths(sprout.digest)))
    flipped(pair.a.blob(seed.digest))
    assert pair.a.json("audit", "plant@bloom", code=3)["faults"]
    planned = pair.a.json("repair", "plant@bloom", "--dry-run")["objects"]
    done = pair.a.json("repair", "plant@bloom")["objects"]
    assert planned == done
    assert [(row["where"].split(",")[0], row["action"]) for row in done] == [
        ("seed@main", "replaced"),
        ("plant@sprout", "fetched"),
        ("plant@sprout", "fetched"),
        ("plant@sprout", "rewritten"),
    ]
    assert pair.a.json("audit", "plant@bloom")["ok"]
    assert pair.a.json("repair", "plant@bloom")["objects"] == []


@pytest.mark.parametrize("where", ["nowhere", "no remote"])
def test_an_ancestor_whose_manifest_nobody_has_is_lost(pair: Pair, where: str) -> None:
    sprout = artifact_of(pair.a, "plant@sprout")
    gone(pair.a.blob(sprout))
    gone(remote_blob(pair, sprout))
    if where == "no remote":
        (pair.a.root / ".dvc" / "config").unlink()
    rows = pair.a.json("repair", "plant@bloom", code=12)["objects"]
    assert [(row["name"], row["action"]) for row in rows] == [(blob_name(sprout), "lost")]
    assert "plant@bloom, input parent" in rows[0]["where"]
    assert "--rebuild" in rows[0]["next_step"]


def test_an_ancestor_that_nobody_vouches_for_gets_its_bytes_and_a_next_step(pair: Pair) -> None:
    """That a child names it proves its bytes, and nothing of what is said about it."""
    store = store_of(pair.a)
    sprout = store.manifest(artifact_of(pair.a, "plant@sprout"))
    forget_in_lock(pair, "plant@sprout")
    gone(pair.a.blob(sprout.digest))
    gone(next(store.attestations.paths(sprout.digest)))
    rows = pair.a.json("repair", "plant@bloom", code=12)["objects"]
    assert [row["action"] for row in rows] == ["fetched", "lost"]
    assert "vpstore lock" in rows[1]["next_step"]
    assert pair.a.blob(sprout.digest).exists()
    assert list(store.attestations.paths(sprout.digest)) == []


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("somebody's")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("odd", [a_folder, a_pipe, a_link])
@pytest.mark.parametrize("way", ["repair", "build"])
def test_what_is_no_file_goes_to_quarantine_and_the_blob_comes_back(pair: Pair, odd: Damage, way: str) -> None:
    for digest in (digests := blobs_of(pair, "plant@bloom")).values():
        if way == "repair" or digest != digests["recipe"]:  # a build takes its recipe from the checkout
            odd(pair.a.blob(digest))
    if way == "repair":
        store = store_of(pair.a)
        attestation = next(store.attestations.paths(artifact_of(pair.a, "plant@bloom")))
        odd(attestation)
        rows = pair.a.json("repair", "plant@bloom")["objects"]
        assert {row["action"] for row in rows} == {"replaced"}
        assert len(rows) == len(digests) + 1
    else:
        pair.a.run("build", "plant@bloom", "--force")
    aside = list((pair.a.store / "quarantine").iterdir())
    assert len(aside) >= len(digests) - 1
    assert not any(path.is_file() for path in aside)
    if odd is a_folder:
        assert all((path / "inside").read_text() == "somebody's" for path in aside)
    assert pair.a.json("verify", "--all")["ok"]
    pair.a.run("gc", "--quarantine", "--grace", "0")
    assert list((pair.a.store / "quarantine").iterdir()) == []


def test_a_disk_that_refuses_is_not_taken_for_a_copy_that_is_nowhere(pair: Pair) -> None:
    """The folder of a blob is a link, through which nothing is written; the remote has the blob."""
    blob = pair.a.blob(blobs_of(pair, "plant@bloom")["shard"])
    elsewhere = pair.folder / "elsewhere"
    blob.parent.rename(elsewhere)
    blob.parent.symlink_to(elsewhere)
    done = pair.a.json("repair", "plant@bloom", code=1)
    assert done["objects"] == []
    told = [row for row in done["failures"] if "model.safetensors" in row["where"]]
    assert [row["what"] for row in told] == ["a folder of the store is a symbolic link"]
    assert told[0]["next_step"]
    assert "no healthy copy" not in pair.a.run("repair", "plant@bloom", code=1).stdout.replace("0 have no", "")


def test_one_pointer_that_cannot_be_read_keeps_nobody_from_the_others(pair: Pair) -> None:
    pair.a.pointer("plant-sprout").write_text("{}")
    digest = blobs_of(pair, "plant@bloom")["shard"]
    for command in (["repair"], ["repair", "plant@bloom", "plant@sprout"]):
        flipped(pair.a.blob(digest))
        done = pair.a.json(*command, code=14)
        assert [(row["name"], row["action"]) for row in done["objects"]] == [(blob_name(digest), "replaced")]
        assert [row["next_step"] for row in done["failures"]] == ["vpstore build plant@sprout"]
    gone(remote_blob(pair, digest))
    done = pair.a.json("push", code=14)
    assert [row["name"] for row in done["objects"]] == [blob_name(digest)]
    assert [row["next_step"] for row in done["failures"]] == ["vpstore build plant@sprout"]
    gone(remote_blob(pair, digest))
    faults = pair.a.json("verify", "--remote", code=3)["faults"]
    assert sum(fault["blob"] == digest for fault in faults) >= 1
    assert sum("plant-sprout.json" in fault["where"] for fault in faults) == 1
    assert pair.a.json("repair", "--to-remote", "shared", code=14)["objects"]
    error = pair.a.json("repair", "plant@sprout", code=14)["error"]  # alone, it is the command's own
    assert error["next_step"] == "vpstore build plant@sprout"


def test_a_lock_that_cannot_be_read_is_said_once_with_a_next_step(pair: Pair) -> None:
    (pair.a.root / "vpstore.lock").write_text("{}")
    for command in (["resolve", "plant"], ["pull"], ["ls"], ["repair"], ["push"]):
        error = pair.a.json(*command, code=14)["error"]
        assert "git restore vpstore.lock" in error["next_step"]


def test_a_folder_without_a_store_has_a_next_step(pair: Pair) -> None:
    assert pair.a.json("repair", "--from-store", "/nonexistent", code=10)["error"]["next_step"]
