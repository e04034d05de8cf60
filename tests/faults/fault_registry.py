"""The fault matrix: every scenario by name, each a function that tries its cases and counts what went wrong.

A scenario is given an empty folder and a share: 1 means every case, 20 about every twentieth. `benchmarks.fault_matrix`
runs all of them and writes the page; the default tests run samples of the same functions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import hostile_names as names
from damage_scenarios import CLASSES
from disk_matrix import SCENARIOS as DISK
from disk_matrix import Bench, Case, Sweep
from dvc_scenarios import TRIALS, Verdict, count_durable
from faulty_disk import KINDS
from fork_server import ForkServer
from mutations import mutate
from negative_controls import CONTROLS
from parsers import Violation, hold, parsers
from shard_headers import disagreement, unsound
from strace_faults import SCENES, SHORT, STRACE, fresh_copy, inject, places
from test_shard_oracle import BOMBS

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One line of a table: what was done, how often, how often something went wrong, and what else there is to say."""

    what: str
    tried: int
    wrong: int
    note: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One table."""

    name: str
    title: str
    note: str  # the head of the last column
    rows: Callable[[Path, int], Iterator[Row]]


@contextmanager
def _bench(folder: Path) -> Iterator[Bench]:
    with ForkServer() as server:
        yield Bench.create(folder / "bench", server)


def disk(folder: Path, share: int) -> Iterator[Row]:
    """Every call of every scenario, spoilt in every way; each core has a bench and a server of its own."""
    with ExitStack() as stack:
        benches = [stack.enter_context(_bench(folder / str(number))) for number in range(os.cpu_count() or 1)]
        pool = stack.enter_context(ThreadPoolExecutor(len(benches)))
        for scenario in DISK:
            sweeps = [Sweep(bench, scenario) for bench in benches]
            for sweep in sweeps:
                sweep.start()
            places = list(sweeps[0].places(share))
            parts = [places[number :: len(sweeps)] for number in range(len(sweeps))]
            cases = [case for done in pool.map(_swept, sweeps, parts) for case in done]
            wrong = [case for case in cases if case.wrong]
            note = f"{len(sweeps[0].calls)} calls, {len({case.kind for case in cases})} kinds of faults"
            examples = tuple(f"{case.kind} at {case.at}, {case.call}: {case.wrong[0]}" for case in wrong[:5])
            yield Row(scenario.name, len(cases), len(wrong), note, examples)


def _swept(sweep: Sweep, places: list[tuple[str, int]]) -> list[Case]:
    return [sweep.run(kind, at) for kind, at in places]


def controls(folder: Path, share: int) -> Iterator[Row]:
    """Breakages on purpose; wrong is one that the sweep did not find."""
    with _bench(folder) as bench:
        for name, (scenario, kind, part, _) in CONTROLS.items():
            sweep = Sweep(bench, next(row for row in DISK if row.name == scenario), name)
            sweep.start()
            places = [at for at, call in enumerate(sweep.calls, 1) if part in " ".join(call)]
            if kind == "short write":
                places = [at for at in places if sweep.calls[at - 1][0] == "write"]
            cases = [sweep.run(kind, at) for at in places[: max(30, len(places) // share)]]
            found = sum(bool(case.wrong) for case in cases)
            yield Row(
                name.replace("_", " "), len(cases), int(found == 0), f"{found} cases accuse it; {scenario}, {kind}"
            )


def kernel(folder: Path, share: int) -> Iterator[Row]:
    """strace kills or refuses at the n-th system call of the real program."""
    if STRACE is None:
        return
    from small_project import make_project

    (folder / "template").mkdir(parents=True)
    template = make_project(folder / "template", folder / "cache")
    template.run("build", "--all")
    by_what: dict[str, list[list[str]]] = {}
    cases = [*SHORT]
    for scene in SCENES:
        cases += places(template, folder / scene, scene, share=share)
    for number, injection in enumerate(cases):
        project = fresh_copy(template, folder / f"case-{number}")
        name = f"{injection.scene}: {injection.call}, {injection.what}"
        by_what.setdefault(name, []).append(inject(project, injection))
        shutil.rmtree(folder / f"case-{number}")
    for what, found in sorted(by_what.items()):
        wrong = [case for case in found if case]
        yield Row(what, len(found), len(wrong), "", tuple(case[0] for case in wrong[:5]))


def damage(folder: Path, share: int) -> Iterator[Row]:
    """Flipped bits, cuts and additions in every class of bytes."""
    count = max(10, 4000 // share)
    with _bench(folder) as bench:
        bench.call("lock_everything", bench.folder / "built")
        for wanted in CLASSES:
            root = bench.folder / "case"
            shutil.copytree(bench.folder / "built", root, symlinks=True)
            done = bench.server.call(
                "damage_scenarios:sweep", wanted.name, count, cwd=root, cache=bench.folder / "damage"
            )
            shutil.rmtree(root)
            if done["end"] != "done":
                yield Row(wanted.name, 1, 1, done.get("trace", done["end"])[-200:])
                continue
            value = done["value"]
            note = ", ".join(f"`{finder}` {number}" for finder, number in value["found"].items())
            note += f"; {value['harmless']} change no meaning" if value["harmless"] else ""
            note += "; `resolve` shows it anew" if wanted.mends else ""
            yield Row(wanted.name, value["tried"], len(value["wrong"]), note, tuple(value["wrong"][:5]))


def documents(folder: Path, share: int) -> Iterator[Row]:
    """Mutated documents for every parser of bytes from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(100, 20_000 // share)
    for parser in parsers(folder):
        taken, wrong = 0, []
        for seed in range(count):
            random = Random(seed)
            try:
                taken += hold(parser, mutate(random.choice(parser.samples), random, is_json=parser.is_json))
            except Violation as violation:
                wrong.append(str(violation)[:200])
        yield Row(f"fuzzer: {parser.name}", count, len(wrong), f"{taken} accepted and given back", tuple(wrong[:5]))
    total = max(500, 100_000 // share)
    wrong = [f"seed {seed}: {fault}" for seed in range(total) if (fault := disagreement(unsound(Random(seed))))]
    yield Row("safetensors headers against the stock library", total, len(wrong), "random defects", tuple(wrong[:5]))
    wrong = [name for name, data in BOMBS.items() if disagreement(data)]
    yield Row("safetensors bombs", len(BOMBS), len(wrong), "none accepted that the stock library refuses", tuple(wrong))


def hostile(folder: Path, share: int) -> Iterator[Row]:
    """Names that lead elsewhere or mean something else, in every place that takes names."""
    for place, call in names.PATH_PLACES.items():
        taken = names.accepted(call, names.PATHS)
        yield Row(place, len(names.PATHS), len(taken), "paths", tuple(map(ascii, taken[:5])))
    for place, call in names.NAME_PLACES.items():
        taken = names.accepted(call, names.NAMES)
        yield Row(place, len(names.NAMES), len(taken), "names", tuple(map(ascii, taken[:5])))
    missed = [ascii(pair) for pair in names.COLLISIONS if not names.colliding(*pair)]
    note = "letter case, unicode form, file and folder"
    yield Row("two paths of one artifact", len(names.COLLISIONS), len(missed), note, tuple(missed))
    yield Row("a ref", len(names.BAD_REFS), len(names.accepted_refs()), "what is no ref")
    yield Row(
        "an object of a remote", len(names.REMOTE_NAMES), len(names.accepted_remote_names()), "what leads elsewhere"
    )


def dvc(folder: Path, share: int) -> Iterator[Row]:
    """The same damage done to both; wrong is a trial that vpstore does not find, or serves."""
    times = max(1, 5 // share)
    for what, (theirs, ours) in TRIALS.items():
        if "killed" in what and STRACE is None:
            continue
        verdicts = {side: [] for side in ("vpstore", "DVC")}
        for side, trial in (("vpstore", ours), ("DVC", theirs)):
            for at in range(1, times + 1):
                place = folder / f"{side}-{at}"
                verdicts[side].append(trial(place, at))
                shutil.rmtree(place, ignore_errors=True)
        wrong = sum(not row.found or row.served or row.mended is False for row in verdicts["vpstore"])
        yield Row(what, times, wrong, "; ".join(f"{side}: {_verdict(rows)}" for side, rows in verdicts.items()))
    if STRACE is not None:
        (dvc_synced, dvc_all), (synced, every) = count_durable(folder / "durable")
        note = f"vpstore: {synced} of {every} files fsynced; DVC: {dvc_synced} of {dvc_all}"
        yield Row("three new files stored; bytes durable before they have a name", 1, int(synced != every), note)


def _verdict(rows: list[Verdict]) -> str:
    words = [f"found {sum(row.found for row in rows)}", f"served {sum(row.served for row in rows)}"]
    if rows[0].mended is not None:
        words.append(f"mended {sum(bool(row.mended) for row in rows)}")
    return ", ".join(words)


def remotes(folder: Path, share: int) -> Iterator[Row]:
    """Faults of networks and remotes, against a real S3 server behind a proxy that spoils answers."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "remote"))
    from fault_matrix import Field, download_rows, upload_rows
    from fault_proxy import FaultProxy
    from remote_places import S3Server, s3_files
    from test_remote_faults import TIMEOUT

    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    folder.mkdir(parents=True, exist_ok=True)
    server = S3Server()
    try:
        with FaultProxy(server.port) as proxy:
            files = {False: s3_files(proxy.endpoint), True: s3_files(proxy.endpoint, read_timeout=TIMEOUT)}
            field = Field(folder, server, proxy, files)
            is_short = share > 1
            for row in (*download_rows(field, is_short=is_short), *upload_rows(field, is_short=is_short)):
                yield Row(row.fault, row.tried, row.wrong, f"{row.arrived} arrived right, {row.refused} refused")
    finally:
        server.stop()


def crowd(folder: Path, share: int) -> Iterator[Row]:
    """Many processes at one store, and gc at every point of everything else: the tests of tests/keep."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.xml"
    which = "slow or not slow" if share == 1 else "not slow"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", which, f"--junitxml={report}", "tests/keep"],
        cwd=REPOSITORY, capture_output=True, timeout=3600, check=False,
    )  # fmt: skip
    counts: dict[str, list[bool]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "").rpartition(".")[2].removeprefix("test_").replace("_", " ")
        if case.find("skipped") is None:
            counts.setdefault(name, []).append(case.find("failure") is not None or case.find("error") is not None)
    for name, failed in counts.items():
        yield Row(name, len(failed), sum(failed), "tests")


KIND_LIST = ", ".join(KINDS)
SCENARIOS = (
    Scenario("disk", "1. A disk that fails at the n-th call", "calls and kinds", disk),
    Scenario("kernel", "1. The same from the kernel's side, by `strace -e inject=`", "", kernel),
    Scenario("controls", "Negative controls: the program broken on purpose", "what found it", controls),
    Scenario("damage", "2. Damage in every class of bytes", "found by", damage),
    Scenario("crowd", "3. Many at once", "", crowd),
    Scenario("remotes", "4. Remotes", "", remotes),
    Scenario("names", "5. Names", "", hostile),
    Scenario("documents", "5. Documents", "", documents),
    Scenario("dvc", "6. The same done to DVC", "by each", dvc),
)
