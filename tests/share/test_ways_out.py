"""Every class of bytes is damaged in turn, and what the commands advise is done, word by word: the fault must end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from signing_tools import Keys, trust
from small_project import Project
from test_repair import blobs_of, flipped, gone
from two_checkouts import Pair, artifact_of, store_of

from vpstore.schema.digest import Digest

REF = "plant@bloom"
Damage = Callable[[Pair], None]
_STEP = re.compile(
    r"vpstore ((?:build|repair|pull|push|lock) (?:--all|[a-z-]+@[a-z-]+)(?: --force)?"
    r"|resolve [a-z]+#[0-9a-f]+ --rebuild)"
)


def on_blob(kind: str, damage: Callable[[Path], None]) -> Damage:
    return lambda pair: damage(pair.a.blob(blobs_of(pair, REF)[kind]))


def attestation(pair: Pair, ref: str = REF, suffix: str = ".json") -> Path:
    return next(path for path in store_of(pair.a).attestations.paths(artifact_of(pair.a, ref)) if path.suffix == suffix)


def key_file(pair: Pair, ref: str = REF) -> Path:
    return key_file_of(pair, artifact_of(pair.a, ref))


def key_file_of(pair: Pair, artifact: Digest) -> Path:
    return store_of(pair.a).keys.folder(store_of(pair.a).manifest(artifact).build.key()) / artifact.hex


def beside(path: Path, name: str, data: bytes) -> None:
    (path.parent / name).write_bytes(data)


def sign(pair: Pair, ref: str) -> None:
    folder = pair.folder / "keys"
    folder.mkdir(exist_ok=True)
    trust(pair.a, "release", Keys(folder).public("p256"))
    pair.a.run("attest", ref, "--key", str(Keys(folder).private("p256")))


def misplaced_statement(pair: Pair) -> None:
    other = attestation(pair, "seed@main")
    shutil.copy(other, attestation(pair).with_name(other.name))


def misplaced_envelope(pair: Pair) -> None:
    sign(pair, "seed@main")
    other = attestation(pair, "seed@main", ".dsse")
    shutil.copy(other, attestation(pair).with_name(other.name))


def damaged_envelope(pair: Pair) -> None:
    sign(pair, REF)
    flipped(attestation(pair, suffix=".dsse"))


def forged_envelope(pair: Pair) -> None:
    """Alone beside no statement, so that nothing sound is left when it is set aside."""
    sign(pair, REF)
    path = attestation(pair, suffix=".dsse")
    document = json.loads(path.read_bytes())
    good = document["signatures"][0]["sig"]
    document["signatures"][0]["sig"] = good[:20] + ("A" if good[20] != "A" else "B") + good[21:]
    data = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
    path.unlink()
    beside(path, Digest.of(data).hex + ".dsse", data)
    gone(attestation(pair))


def misplaced_alone(pair: Pair) -> None:
    misplaced_statement(pair)
    for path in list(attestation(pair).parent.iterdir()):
        if b"plant@bloom" not in path.read_bytes():
            continue
        path.unlink()


def no_statement(pair: Pair) -> None:
    path = attestation(pair)
    beside(path, Digest.of(b"{}").hex + ".json", b"{}")


CLASSES: dict[str, Damage] = {
    **{f"{kind}, damaged": on_blob(kind, flipped) for kind in ("manifest", "shard", "table", "intermediate", "report")},
    **{f"{kind}, missing": on_blob(kind, gone) for kind in ("manifest", "shard", "table", "intermediate", "recipe")},
    "parent's manifest, damaged": lambda pair: flipped(pair.a.blob(artifact_of(pair.a, "plant@sprout"))),
    "parent's manifest, missing": lambda pair: gone(pair.a.blob(artifact_of(pair.a, "plant@sprout"))),
    "attestation, damaged": lambda pair: flipped(attestation(pair)),
    "attestation, missing": lambda pair: gone(attestation(pair)),
    "attestation of another artifact": misplaced_statement,
    "attestation of another artifact alone": misplaced_alone,
    "attestation that is none": no_statement,
    "attestation's folder with a stray": lambda pair: beside(attestation(pair), "notes.json", b"mine"),
    "envelope of another artifact": misplaced_envelope,
    "envelope, damaged": damaged_envelope,
    "envelope, forged and alone": forged_envelope,
    "key, damaged": lambda pair: flipped(key_file(pair)),
    "key, missing": lambda pair: gone(key_file(pair)),
    "key of another artifact": lambda pair: beside(key_file(pair), "1" * 64, b"{}"),
}


# The others take minutes and differ little from these.
OFTEN = {
    "shard, damaged", "table, missing", "parent's manifest, missing", "attestation, damaged",
    "envelope of another artifact",
}  # fmt: skip


def cases(*parts: str) -> list[Any]:
    """The classes of damage with one of these parts in their names; most of them for the long run."""
    names = [name for name in CLASSES if any(part in name for part in parts)]
    return [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in names]


def follow(project: Project, *command: str) -> None:
    """Run a command and do what it says, until it is content."""
    said = set()
    while (done := project.outcome(*command, "--json")).returncode:
        assert done.stdout not in said, f"the same advice again:\n{done.stdout}"
        said.add(done.stdout)
        document = json.loads(done.stdout)
        rows = [*document.get("objects", []), *document.get("failures", []), document.get("error", {})]
        steps = [step for row in rows for step in _STEP.findall(row.get("next_step", ""))]
        assert steps, f"no step to follow:\n{done.stdout}"
        for step in dict.fromkeys(steps):
            project.outcome(*step.split())


@pytest.mark.parametrize("name", cases(""))
@pytest.mark.parametrize("copies", [pytest.param("remote", marks=pytest.mark.slow), "nowhere"])
def test_what_repair_advises_ends_the_fault(pair: Pair, name: str, copies: str) -> None:
    CLASSES[name](pair)
    if copies == "nowhere":
        (pair.a.root / ".dvc" / "config").unlink()
    faults = pair.a.json("verify", "--all", code=3)["faults"]
    assert [row["where"].startswith("store: ") for row in faults] == [name == "key of another artifact"] * len(faults)
    follow(pair.a, "repair")
    assert pair.a.json("verify", "--all")["ok"]
    assert pair.a.json("repair")["objects"] == []
    assert pair.a.json("audit", REF)["ok"]


@pytest.mark.parametrize("name", cases(""))
def test_what_push_advises_ends_the_fault(pair: Pair, name: str) -> None:
    """To a remote that has nothing yet; the other one has healthy copies."""
    CLASSES[name](pair)
    config = pair.a.root / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"empty\"']\n    url = {pair.folder / 'empty'}\n")
    follow(pair.a, "push", "-r", "empty")
    if not name.startswith("key"):  # of which push takes only what is sound
        assert pair.a.json("push", "-r", "empty")["failures"] == []


@pytest.mark.parametrize("name", cases("damaged"))
def test_what_pull_advises_ends_the_fault(pair: Pair, name: str) -> None:
    CLASSES[name](pair)
    follow(pair.a, "pull")


def test_a_misplaced_envelope_is_set_aside_and_the_store_is_whole(pair: Pair) -> None:
    misplaced_envelope(pair)
    path = next(path for path in attestation(pair).parent.iterdir() if path.suffix == ".dsse")
    data = path.read_bytes()
    assert len(pair.a.json("verify", "--all", code=3)["faults"]) == 1
    (row,) = pair.a.json("repair", REF)["objects"]
    assert (row["action"], row["next_step"]) == ("quarantined", "")
    assert "another artifact" in row["found"]
    (kept,) = (pair.a.store / "quarantine").iterdir()
    assert kept.read_bytes() == data
    assert not path.exists()
    assert pair.a.json("verify", "--all")["ok"]
    pair.a.run("push")


def superseded(pair: Pair) -> Digest:
    """Build a parent anew from another config, and empty the remote: the child's ancestor is no longer what it was."""
    ancestor = artifact_of(pair.a, "plant@sprout")
    config = pair.a.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 1", "step = 9"))
    pair.a.run("build", "plant@sprout")
    shutil.rmtree(pair.remote)
    return ancestor


def unattested(pair: Pair, ancestor: Digest) -> None:
    for path in store_of(pair.a).attestations.paths(ancestor):
        path.unlink()


@pytest.mark.parametrize("command", ["repair", pytest.param("push", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_attested", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_ancestor_that_is_no_longer_current_is_made_again(pair: Pair, command: str, is_attested: bool) -> None:
    """By its digits, which alone lead to it; what its name leads to is left as it is."""
    ancestor = superseded(pair)
    pointers = [pair.a.pointer(slug).read_bytes() for slug in ("plant-sprout", "plant-bloom")]
    flipped(pair.a.blob(store_of(pair.a).manifest(ancestor).by_path["model.safetensors"].digest))
    if not is_attested:
        unattested(pair, ancestor)
    follow(pair.a, command, REF)
    assert pair.a.json("repair", REF)["objects"] == []
    assert pair.a.json("audit", REF)["ok"]
    assert [pair.a.pointer(slug).read_bytes() for slug in ("plant-sprout", "plant-bloom")] == pointers


@pytest.mark.parametrize("part", ["manifest", pytest.param("attestation", marks=pytest.mark.slow)])
def test_what_only_another_config_makes_again_is_said_to_be_so(pair: Pair, part: str) -> None:
    """Neither repair nor push advises a build of what the ancestor's name leads to by now."""
    ancestor = superseded(pair)
    if part == "manifest":
        gone(pair.a.blob(ancestor))
        (failure,) = pair.a.json("push", REF, code=12)["failures"]
        assert failure["where"].startswith(f"{REF}, input parent")
        assert "check out the config that made it" in failure["next_step"]
        assert not re.search("--all|--force|--rebuild", failure["next_step"])
    else:
        unattested(pair, ancestor)
        gone(key_file_of(pair, ancestor))
    rows = pair.a.json("repair", REF, code=12)["objects"]
    assert all("check out the config that made" in row["next_step"] for row in rows)
    config = pair.a.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 9", "step = 1"))
    pair.a.run("build", "plant@sprout", "--force")
    assert pair.a.json("repair", REF)["objects"] == []
    pair.a.run("push", REF)
