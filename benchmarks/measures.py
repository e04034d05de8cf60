"""The measures, each against its rival, each with the aim that it is held to.

Place: between the small projects and the command line of the benchmark.
Invariants: both sides of a ratio are of one run; the caches of the operating system are as warm for one side as for the
other; every time is of a whole process, start-up included, unless the name of the measure says otherwise.

Example:
    for figure in ingest(place, Sizes.full()): print(figure.name, figure.value, figure.is_met)
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.projects import Place, dvc_repository, remove, write_project, write_shards
from benchmarks.sides import Side, alternate, nothing

MIB: Final = 1 << 20

INGEST = """
import sys
from pathlib import Path
from vpstore.runner import Staged, StagedFile
from vpstore.schema.manifest import BuildRecord
from vpstore.schema.ref import StageRef
from vpstore.surroundings import Stopwatch
from vpstore.verbs.publish import Publication, publish
from vpstore.workspace import Workspace
work = Workspace.find(Path.cwd())
watch, scratch = Stopwatch(), Path(sys.argv[1])
files = [StagedFile(path.name, "application/vnd.safetensors", path) for path in sorted(scratch.iterdir())]
publication = Publication(StageRef("big", "main"), BuildRecord("bench.make", (), {}), Staged(files), scratch)
publish(work, publication, facts=lambda: watch.facts(work.checkout.root, {}))
"""


# The least that anybody can do who wants the bytes to survive a power cut: what the disk takes at that moment.
_COPY: Final = 'cp -r "$0/source" "$0/copy" && find "$0/copy" -type f -exec sync {} +'


@dataclass(frozen=True)
class Sizes:
    """How much is moved."""

    count: int  # files
    file_bytes: int
    verify_bytes: int  # of each file of the artifact that is verified and resolved
    small_bytes: int  # of the one blob whose memory is compared with ...
    large_bytes: int  # ... this one's
    rounds: int

    @classmethod
    def full(cls) -> Sizes:
        """What the aims are about."""
        return cls(16, 64 * MIB, 512 * MIB, 64 * MIB, 2048 * MIB, 5)

    @classmethod
    def quick(cls) -> Sizes:
        """Enough to see that the benchmark works; its figures mean nothing."""
        return cls(4, MIB, MIB, 40 * MIB, 120 * MIB, 1)


@dataclass(frozen=True)
class Figure:
    """One number and what it is held to."""

    name: str
    value: float
    unit: str
    aim: str  # "" if it is only told
    is_met: bool | None
    sides: dict[str, Any]


def figure(name: str, value: float, aim: str, *, unit: str = "x", sides: dict[str, Side] | None = None) -> Figure:
    """A figure held to an aim like `>= 4` or `<= 0.2`; the unit x is a ratio."""
    met = None
    if aim:
        relation, _, bound = aim.partition(" ")
        met = value >= float(bound) if relation == ">=" else value <= float(bound)
    return Figure(name, round(value, 3), unit, aim, met, {key: side.to_json() for key, side in (sides or {}).items()})


def ingest(place: Place, sizes: Sizes) -> Iterator[Figure]:
    """Staged files become blobs, against `dvc add` of the same directory, from the page cache."""
    top = place.root / "ingest"
    source = top / "source"
    write_shards(source, count=sizes.count, size_bytes=sizes.file_bytes)
    ours = write_project(top / "ours", shards=source)
    theirs = dvc_repository(place, top / "theirs")
    scratch = ours / ".vpstore" / "work" / "scratch"

    def stage(*, synced: bool) -> None:
        remove(ours / ".vpstore")
        place.python(ours, "from vpstore.storage.store import Store; from pathlib import Path; "
                           "Store.create(Path('.vpstore').absolute())").run()  # fmt: skip
        shutil.copytree(source, scratch)
        if synced:
            place.command(ours, "sync").run()

    def reset(*, synced: bool) -> None:
        for path in (theirs / "data", theirs / ".dvc" / "cache", theirs / ".dvc" / "tmp", place.root / "site"):
            remove(path)
        (theirs / "data.dvc").unlink(missing_ok=True)
        shutil.copytree(source, theirs / "data")
        if synced:
            place.command(theirs, "sync").run()

    publish = place.python(ours, INGEST, str(scratch))
    add = place.dvc(theirs, "add", "-q", "data")
    for synced, name in ((True, "ingest, files at rest"), (False, "ingest, files just written")):
        sides = alternate(
            {
                "vpstore publish": (lambda synced=synced: stage(synced=synced), publish),  # type: ignore[misc]
                "dvc add": (lambda synced=synced: reset(synced=synced), add),  # type: ignore[misc]
            },
            rounds=sizes.rounds,
        )
        ratio = sides["dvc add"].median / sides["vpstore publish"].median
        yield figure(f"{name}: times faster than dvc add", ratio, ">= 4", sides=sides)
    remove(top)


def verify_and_resolve(place: Place, sizes: Sizes) -> Iterator[Figure]:
    """Every byte read again, against b3sum; and one path printed, for an artifact of that size."""
    top = place.root / "verify"
    write_shards(top / "source", count=sizes.count, size_bytes=sizes.verify_bytes)
    ours = write_project(top / "ours", shards=top / "source")
    place.vpstore(ours, "build", "big").run()
    remove(top / "source")
    blobs = sorted(path for path in (ours / ".vpstore" / "blobs").rglob("*") if path.is_file())
    place.vpstore(ours, "resolve", "big").run()
    total = sum(path.stat().st_size for path in blobs)
    verify = place.vpstore(ours, "verify", "--full", "big")
    sides = alternate(
        {
            "vpstore verify --full": (nothing, verify),
            "b3sum": (nothing, place.command(ours, *_b3sum(), *map(str, blobs))),
            "start-up": (nothing, place.vpstore(ours, "verify", "--quick", "big")),
        },
        rounds=sizes.rounds,
    )
    rate = {name: total / side.median / 1e9 for name, side in sides.items()}
    reading = sides["vpstore verify --full"].median - sides["start-up"].median
    net = sides["b3sum"].median / max(reading, 1e-9)
    yield figure("verify --full: share of b3sum's throughput, start-up apart", net, ">= 0.9", sides=sides)
    yield figure(
        f"verify --full of {total / 1e9:.1f} GB, whole process: share of b3sum's throughput",
        rate["vpstore verify --full"] / rate["b3sum"], "",
    )  # fmt: skip
    yield figure("verify --full, whole process", rate["vpstore verify --full"], "", unit="GB/s")
    yield figure("b3sum, whole process", rate["b3sum"], "", unit="GB/s")
    resolve = alternate(
        {"vpstore resolve": (nothing, place.vpstore(ours, "resolve", "big"))}, rounds=2 * sizes.rounds + 1
    )
    yield figure(
        f"warm resolve of {total / 1e9:.1f} GB", resolve["vpstore resolve"].median, "<= 0.2", unit="s", sides=resolve
    )
    remove(top)


def _b3sum() -> list[str]:
    """The program, or the package that is made from the same source."""
    found = shutil.which("b3sum")
    if found:
        return [found]
    code = (
        "import sys\nfrom blake3 import blake3\n"
        "for path in sys.argv[1:]: print(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())"
    )
    return [sys.executable, "-c", code]


def sharing(place: Place, sizes: Sizes) -> Iterator[Figure]:
    """A verified pull through a local remote, against DVC's with `verify = true`; push is told beside it."""
    top = place.root / "sharing"
    write_shards(top / "source", count=sizes.count, size_bytes=sizes.file_bytes)
    ours = write_project(dvc_repository(place, top / "ours", remote=top / "remote"), shards=top / "source")
    place.vpstore(ours, "build", "big").run()
    place.vpstore(ours, "lock").run()
    theirs = dvc_repository(place, top / "theirs", remote=top / "theirs-remote", config=("remote.shared.verify=true",))
    shutil.copytree(top / "source", theirs / "data")
    place.dvc(theirs, "add", "-q", "data").run()
    pushes = alternate(
        {
            "vpstore push": (lambda: remove(top / "remote"), place.vpstore(ours, "push", "big")),
            "dvc push": (lambda: remove(top / "theirs-remote"), place.dvc(theirs, "push", "-q")),
        },
        rounds=sizes.rounds,
    )

    def forget_ours() -> None:
        remove(ours / ".vpstore")
        remove(ours / "weights")
        os.sync()  # nobody's time shall hold what the other side left for the disk to write

    def forget_theirs() -> None:
        for path in (theirs / "data", theirs / ".dvc" / "cache", theirs / ".dvc" / "tmp", place.root / "site"):
            remove(path)
        os.sync()

    def forget_copy() -> None:
        remove(top / "copy")
        os.sync()

    pulls = alternate(
        {
            "vpstore pull": (forget_ours, place.vpstore(ours, "pull", "big")),
            "dvc pull, verify = true": (forget_theirs, place.dvc(theirs, "pull", "-q")),
            "a copy, made durable": (forget_copy, place.command(ours, "sh", "-c", _COPY, str(top))),
        },
        rounds=sizes.rounds,
    )
    yield figure(
        "verified pull: share of dvc pull's time with verify = true",
        pulls["vpstore pull"].median / pulls["dvc pull, verify = true"].median, "<= 0.5", sides=pulls,
    )  # fmt: skip
    yield figure(
        "verified pull: times that of a plain copy with fsync, start-up included",
        pulls["vpstore pull"].median / pulls["a copy, made durable"].median, "",
    )  # fmt: skip
    yield figure(
        "push: share of dvc push's time", pushes["vpstore push"].median / pushes["dvc push"].median, "", sides=pushes
    )
    remove(top)


def peaks(place: Place, size_bytes: int, *, shared: bool = True) -> dict[str, int]:
    """The most memory that each command holds at any moment, in bytes, for an artifact of one blob of this size.

    Args:    shared: with push and pull, too.
    """
    top = place.root / "memory"
    write_shards(top / "source", count=1, size_bytes=size_bytes)
    checkout = dvc_repository(place, top / "ours", remote=top / "remote") if shared else top / "ours"
    ours = write_project(checkout, shards=top / "source")
    found = {"ingest": place.vpstore(ours, "build", "big").run().peak_bytes}
    found["verify"] = place.vpstore(ours, "verify", "--full", "big").run().peak_bytes
    if shared:
        found["push"] = place.vpstore(ours, "push", "big").run().peak_bytes
        place.vpstore(ours, "lock").run()
        remove(ours / ".vpstore")
        remove(ours / "weights")
        found["pull"] = place.vpstore(ours, "pull", "big").run().peak_bytes
    remove(top)
    return found


def memory(place: Place, sizes: Sizes) -> Iterator[Figure]:
    """Peak memory of ingest, verify, push and pull, of one blob and of one that is many times larger."""
    small, large = peaks(place, sizes.small_bytes), peaks(place, sizes.large_bytes)
    blobs = f"a blob of {sizes.large_bytes // MIB} over one of {sizes.small_bytes // MIB} MiB"
    for name, peak in large.items():
        text = f"{small[name] / MIB:.0f} -> {peak / MIB:.0f} MiB"
        yield figure(f"peak memory of {name}, {blobs} ({text})", peak / small[name], "<= 1.25")


def graph(place: Place, sizes: Sizes) -> Iterator[Figure]:
    """This repository's own graph: a no-op `dvc repro`, and one path, beside what DVC takes for plain commands."""
    from benchmarks.own_graph import copies

    built = copies(place)
    if built is None:
        return
    ours, plain, bare = built
    sides = alternate(
        {
            "dvc repro": (nothing, place.dvc(ours, "repro", "-q")),
            "dvc repro, plain commands": (nothing, place.dvc(plain, "repro", "-q")),
            "dvc repro, no code deps": (nothing, place.dvc(bare, "repro", "-q")),
            "dvc status": (nothing, place.dvc(ours, "status", "-q")),
            "vpstore resolve": (nothing, place.vpstore(ours, "resolve", "vpMoE")),
        },
        rounds=sizes.rounds,
    )
    extra = sides["dvc repro"].median - sides["dvc repro, plain commands"].median
    yield figure("no-op dvc repro: seconds over DVC's own", extra, "<= 0.1", unit="s", sides=sides)
    code = sides["dvc repro, plain commands"].median - sides["dvc repro, no code deps"].median
    yield figure("no-op dvc repro: seconds that DVC takes for dependencies on code", code, "", unit="s")
    resolve = sides["vpstore resolve"].median
    yield figure("warm resolve of vpMoE", resolve, "<= 0.2", unit="s")
    yield figure("warm resolve: share of dvc status", resolve / sides["dvc status"].median, "<= 0.5")
