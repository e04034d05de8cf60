"""The sweep: every call of every scenario, spoilt in every way, and the five questions asked of what is left.

1. Does every ref still lead to exactly the bytes that an undisturbed build gives, or to an error of ours?
2. Is what was acknowledged before the fault still there, byte for byte?
3. Does a retry end where an undisturbed run ends, and does a power cut after it take nothing back?
4. Was the fault answered with an error of ours that has a next step?
5. Is nothing left under a temporary name, except by a kill?
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damage_tools import flip
from disk_scenarios import PAYLOADS
from faulty_disk import KILLS, KINDS, WRITES
from fork_server import ForkServer
from small_project import make_project, pointed

from vpstore.schema.digest import Digest


@dataclass(frozen=True)
class DiskScenario:
    """A function of disk_scenarios, and how its project is prepared from one in which everything is built."""

    name: str
    function: str
    prepare: Callable[[Path, Bench], None]
    is_fresh: bool = False  # start from a checkout without a store
    is_damaged: bool = False  # what the scenario starts from need not resolve


@dataclass
class Bench:
    """One sweep's folder: templates, and the truth about every artifact there can be."""

    folder: Path
    server: ForkServer
    truth: dict[str, dict[str, str]] = field(default_factory=dict)  # artifact -> files
    steps: dict[int, dict[str, str]] = field(default_factory=dict)  # step -> the pointer of plant@bloom

    @classmethod
    def create(cls, folder: Path, server: ForkServer) -> Bench:
        """Make the project once, build it at two settings, and remember what it shows."""
        bench = cls(folder, server)
        (folder / "bare").mkdir(parents=True)
        make_project(folder / "bare", folder / "cache")
        for path in (folder / "bare").rglob("__pycache__"):
            shutil.rmtree(path)
        shutil.copytree(folder / "bare", folder / "built")
        for step in (3, 2):
            set_step(folder / "built", step)
            bench.call("build_everything", folder / "built")
            if step == 3:
                shutil.copytree(folder / "built", folder / "other", symlinks=True)
            bench.learn(folder / "built")
            pointer = folder / "built" / "weights" / "tiny" / "refs" / "plant-bloom.json"
            bench.steps[step] = {**json.loads(pointer.read_text()), "artifact": pointed(pointer)["artifact"]}
        set_step(folder / "bare", 2)
        shutil.copytree(folder / "built", folder / "pushed", symlinks=True)
        bench.call("share_everything", folder / "pushed")
        return bench

    def call(self, function: str, root: Path, *arguments: Any) -> Any:
        """A call that is expected to end."""
        done = self.server.call(f"disk_scenarios:{function}", *arguments, cwd=root, cache=self.folder / "cache")
        assert done["end"] == "done", done
        return done["value"]

    def learn(self, root: Path) -> dict[str, Any]:
        """Add an undisturbed project to the truth."""
        seen = dict(self.call("observe", root))
        assert seen["faults"] == [], seen["faults"]
        for row in seen["first"].values():
            if "artifact" in row:
                self.truth[row["artifact"]] = row["files"]
        return seen


def set_step(root: Path, step: int) -> None:
    """Choose what plant@bloom and, through it, everything after is."""
    (root / "configs" / "plant.toml").write_text(f"[sprout]\nstep = {step}\n[bloom]\nstep = {step}\n")


def _edit(root: Path, _: Bench) -> None:
    set_step(root, 7)


def _nothing(root: Path, _: Bench) -> None:
    """The scenario starts from what is built."""


def _change_back(root: Path, _: Bench) -> None:
    set_step(root, 3)
    for view in (root / "weights" / "tiny").glob("plant@*"):
        shutil.rmtree(view) if view.is_dir() else view.unlink()


def _spoil_view(root: Path, _: Bench) -> None:
    artifact = pointed(root / "weights" / "tiny" / "refs" / "plant-bloom.json")["artifact"]
    view = root / "weights" / "tiny" / f"plant@bloom-{artifact[7:19]}"
    file = view / "reports" / "metrics.json"
    if file.is_symlink():
        file.unlink()
    file.write_text("mine")


def _want_other(root: Path, bench: Bench) -> None:
    (root / "wanted.json").write_text(json.dumps(bench.steps[3]))


def _lose_claims(root: Path, _: Bench) -> None:
    pointer = pointed(root / "weights" / "tiny" / "refs" / "plant-bloom.json")
    key, artifact = pointer["key"][7:], pointer["artifact"][7:]
    (root / ".vpstore" / "keys" / key[:2] / key / artifact).unlink()
    folder = root / ".vpstore" / "attestations" / artifact
    (root / "saved").mkdir()
    shutil.move(folder, root / "saved" / artifact)


def _clone(root: Path, bench: Bench) -> None:
    shutil.copytree(bench.folder / "pushed" / "remote", root / "remote")
    shutil.copy(bench.folder / "pushed" / "vpstore.lock", root / "vpstore.lock")


def _damage_store(root: Path, bench: Bench) -> None:
    shutil.copytree(bench.folder / "pushed" / "remote", root / "remote")
    artifact = bench.steps[2]["artifact"]
    manifest = _blob(root, artifact)
    files = {row["path"]: row for row in json.loads(manifest.read_bytes())["files"]}
    flip(_blob(root, files["model.safetensors"]["digest"]), 200)
    _blob(root, files["model.safetensors"]["tensors"]).unlink()
    flip(manifest, 50)
    report = _blob(root, files["reports/metrics.json"]["digest"])  # and a folder where a file should be
    report.unlink()
    report.mkdir()


def _abandon(root: Path, bench: Bench) -> None:
    """Artifacts of the first setting that no pointer leads to any more; their views go, too."""
    refs = [pointed(path) for path in (root / "weights" / "tiny" / "refs").glob("*.json")]
    kept = {pointer["artifact"][7:19] for pointer in refs}
    for view in (root / "weights" / "tiny").glob("*@*"):
        if view.name.split(".")[0].rpartition("-")[2] not in kept:
            shutil.rmtree(view) if view.is_dir() else view.unlink()
    for record in (root / ".vpstore" / "roots").glob("*.json"):  # of the checkout that this one was copied from
        record.unlink()
    bench.call("resolved", root)  # registers this one


def _blob(root: Path, digest: str) -> Path:
    return root / ".vpstore" / "blobs" / "blake3" / digest[7:9] / digest[9:]


def _damage_payloads(root: Path, _: Bench) -> None:
    (root / "outside").mkdir()
    for data in PAYLOADS.values():
        digits = Digest.of(data).hex
        path = root / ".vpstore" / "blobs" / "blake3" / digits[:2] / digits[2:]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
        flip(path, 3)


SCENARIOS = (
    DiskScenario("first build, store included", "build_seed", _nothing, is_fresh=True),
    DiskScenario("publish of two artifacts", "build_chain", _edit),
    DiskScenario("cache hit", "build_chain", _change_back),
    DiskScenario("pointer update", "write_pointer", _want_other),
    DiskScenario("replacing a changed view", "show_view", _spoil_view),
    DiskScenario("lock", "write_lock", _nothing),
    DiskScenario("attestation and key", "write_claims", _lose_claims, is_damaged=True),
    DiskScenario("blobs over damaged ones", "replace_damaged", _damage_payloads, is_damaged=True),
    DiskScenario("roots", "hold_roots", _nothing),
    DiskScenario("push", "push_all", _nothing),
    DiskScenario("pull to a fresh clone", "pull_all", _clone, is_fresh=True),
    DiskScenario("repair", "repair_all", _damage_store, is_damaged=True),
    DiskScenario("gc", "collect", _abandon),
)


@dataclass(frozen=True)
class Case:
    """One spoilt run and what was wrong with what it left; nothing, if all is well."""

    scenario: str
    kind: str
    at: int
    call: str
    wrong: tuple[str, ...]


@dataclass
class Sweep:
    """One scenario on one bench."""

    bench: Bench
    scenario: DiskScenario
    control: str = ""  # a function of negative_controls that breaks the program on purpose
    end: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str, str]] = field(default_factory=list)

    def start(self) -> None:
        """Run undisturbed: count the calls, and see where it should end."""
        case = self._project("undisturbed")
        done = self._attempt(case, None, 0)
        assert done["end"] == "done", done
        assert done["value"]["error"] is None, done
        self.calls = [tuple(row) for row in done["value"]["calls"]]
        seen = self.bench.call("observe", case / "checkout")
        self.end = seen["end"]
        for row in seen["first"].values():
            if "artifact" in row:
                self.bench.truth[row["artifact"]] = row["files"]
        shutil.rmtree(case)

    def places(self, every: int, *, first: int = 1) -> Iterator[tuple[str, int]]:
        """Every n-th pair of a kind and a call; kinds of writes only where a write is."""
        pairs = [
            (kind, at)
            for at in range(1, len(self.calls) + 1)
            for kind in KINDS
            if kind not in WRITES or self.calls[at - 1][0] == "write"
        ]
        yield from pairs[first - 1 :: every]

    def run(self, kind: str, at: int) -> Case:
        """Spoil one call and judge."""
        case = self._project(f"{kind}-{at}".replace(" ", "-"))
        done = self._attempt(case, kind, at)
        left = self.bench.server.call(
            "disk_scenarios:settle", self.scenario.function, str(case), self.control, self.scenario.is_fresh,
            cwd=case / "checkout", cache=case / "cache",
        )  # fmt: skip
        wrong = [*self._judge_attempt(kind, at, done), *self._judge_rest(kind, at, left)]
        shutil.rmtree(case)
        return Case(self.scenario.name, kind, at, " ".join(self.calls[at - 1]), tuple(wrong))

    def _project(self, name: str) -> Path:
        case = self.bench.folder / "cases" / name
        case.mkdir(parents=True)
        source = self.bench.folder / ("bare" if self.scenario.is_fresh else "built")
        shutil.copytree(source, case / "checkout", symlinks=True)
        self.scenario.prepare(case / "checkout", self.bench)
        return case

    def _attempt(self, case: Path, kind: str | None, at: int) -> dict[str, Any]:
        return self.bench.server.call(
            "disk_scenarios:attempt", self.scenario.function, kind, at, str(case), self.control,
            cwd=case / "checkout", cache=case / "cache",
        )  # fmt: skip

    def _judge_attempt(self, kind: str, at: int, done: dict[str, Any]) -> Iterator[str]:
        if kind in KILLS:
            if done["end"] != "killed":
                yield f"the kill did not come: {done['end']}"
        elif done["end"] == "crashed":
            yield "a traceback: " + done["trace"].strip().splitlines()[-1]
        elif done["end"] != "done":
            yield done["end"]
        elif (error := done["value"]["error"]) is not None:
            if kind == "short write":
                yield f"a short write was not continued: {error['what']}"
            elif not error["next"] or not error["where"]:
                yield f"an error without a next step: {error['what']}"

    def _judge_rest(self, kind: str, at: int, left: dict[str, Any]) -> Iterator[str]:
        if left["end"] != "done":
            yield "afterwards: " + left.get("trace", left["end"]).strip().splitlines()[-1]
            return
        found = left["value"]
        is_removal = self.calls[at - 1][0] in ("unlink", "rmdir")  # then it cannot have been removed
        if kind not in KILLS and not is_removal and found["litter"]:
            yield f"left behind: {', '.join(found['litter'])}"
        if found["retry"] is not None:
            yield f"the retry failed: {found['retry']['what']}"
        for when in ("first", "last"):
            yield from (f"{when}: {text}" for text in self._judge_refs(found[when], is_first=when == "first"))
        if found["end"] != self.end:
            changed = {path for path in found["end"].keys() | self.end.keys()
                       if found["end"].get(path) != self.end.get(path)}  # fmt: skip
            yield f"the retry ends elsewhere: {', '.join(sorted(changed)[:4])}"
        yield from (f"remote: {fault}" for fault in found["remote"])
        if not self.scenario.is_damaged:
            yield from (f"before the retry: {fault}" for fault in found["unfounded"])
        if not self.scenario.is_damaged and not self.scenario.is_fresh:
            yield from (f"verify before the retry: {fault}" for fault in found["early"])
        yield from (f"verify: {fault}" for fault in found["faults"])
        yield from (f"acknowledged, but lost: {text}" for text in found["acknowledged"])
        yield from (
            f"acknowledged by the retry, but lost in a power cut: {text}" for text in found["acknowledged again"]
        )

    def _judge_refs(self, refs: dict[str, Any], *, is_first: bool) -> Iterator[str]:
        for ref, row in refs.items():
            if ref == "store":
                if not (self.scenario.is_fresh and is_first):
                    yield f"the store is gone: {row}"
            elif "artifact" not in row:
                may_miss = self.scenario.is_damaged or self.scenario.is_fresh
                if not may_miss or not row["next"]:
                    yield f"{ref} does not resolve any more: {row}"
            elif self.bench.truth.get(row["artifact"]) != row["files"]:
                yield f"{ref} leads to wrong bytes"
