"""What the child processes of the tests of recipes/execute.py do: each is one build, or a part of one.

python execute_driver.py COMMAND ROOT [ARGUMENTS]
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from recipes import execute, runtime
from recipes.job import Job
from recipes.recipe import InputArtifact

THREADS = 1
ROUTER_INPUTS = Path("intermediates/000-router_inputs.safetensors")
MEBIBYTE = 1 << 20


class Halt(Exception):
    """The build stops here, as if it were interrupted before its first tensor."""


def silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""


def make(root: Path) -> None:
    """A pico parent with random weights, its data and tokenizer, and the params that make experts of it."""
    runtime.fix_numerics(THREADS)
    from surgery_pico import Workshop, pico_config, random_tensors
    from test_moe_recipe import PARENT, params

    config = pico_config(attention="tpa")
    assert config == PARENT
    Workshop.make(root, config, random_tensors(config))
    quick = params(calibration_tokens=400, check_tokens=16, min_router_entropy=0.5, max_expert_load=0.3)
    (root / "params.json").write_text(quick.model_dump_json())


def job(root: Path, scratch: str) -> Job:
    folder = root / scratch
    folder.mkdir(exist_ok=True)
    roles = ("parent", "data", "tokenizer")
    inputs = {role: InputArtifact(role, f"{role}@test", "blake3:0", root / role) for role in roles}
    params = json.loads((root / "params.json").read_text())
    return Job("observed_upcycle", params, THREADS, inputs, {}, folder)


def mixed(names: list[str]) -> list[str]:
    """Another order than the plan's and than the alphabet's, the same in every process."""
    found = sorted(names)
    random.Random(7).shuffle(found)
    assert found != names
    assert found != sorted(names)
    return found


def halt(names: list[str], *, note: Path | None = None) -> list[str]:
    if note:
        note.write_text(json.dumps(names))
    raise Halt


def baseline(root: Path) -> None:
    """The inputs, a plain build, one in another order, and one that stops before its first tensor."""
    make(root)
    made = execute.carry_out(job(root, "plain"), silent)
    (root / "plain" / "made.json").write_text(json.dumps(sorted(made.files)))
    execute.carry_out(job(root, "mixed"), silent, order=mixed)
    with suppress(Halt):
        execute.carry_out(job(root, "shares"), silent, order=partial(halt, note=root / "shares" / "names.json"))


def build(root: Path, scratch: str) -> None:
    execute.carry_out(job(root, scratch), silent)


def share(root: Path, number: str, of: str) -> None:
    """Every `of`-th tensor of the build that was stopped."""
    runtime.fix_numerics(THREADS)  # a worker of a build inherits its environment instead
    whole = job(root, "shares")
    names = json.loads((whole.scratch / "names.json").read_text())
    known = {"router_inputs": whole.scratch / ROUTER_INPUTS}
    part = Job(whole.entry, whole.params, THREADS, whole.inputs, {}, whole.scratch, known)
    assert execute.compute_share(part, names[int(number) :: int(of)]) > 0


def trial(root: Path, **params: object) -> Job:
    """A build of the small recipe in a new folder."""
    root.mkdir()
    return Job("trial_recipe", params, THREADS, {}, {}, root)


def memory(root: Path, count: str, mebibytes: str) -> None:
    """Print by how many bytes building `count` tensors of so many mebibytes each raises the peak of this process.

    Then the same for a recipe that holds all its tensors from the start; it is not built to the end.
    """
    sizes = {"count": int(count), "elements": int(mebibytes) * MEBIBYTE // 4}
    execute.carry_out(trial(root / "warm", count=1), silent)
    peaks = [peak_bytes()]
    execute.carry_out(trial(root / "lean", **sizes), silent)
    peaks.append(peak_bytes())
    with suppress(Halt):
        execute.carry_out(trial(root / "hoard", fault="hoard", **sizes), silent, order=halt)
    peaks.append(peak_bytes())
    print(json.dumps([peak - peaks[0] for peak in peaks[1:]]))


def peak_bytes() -> int:
    """The high-water mark of this program: ru_maxrss would start at what the parent had when it forked."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def wait(root: Path) -> None:
    """A build whose tensors take for ever."""
    execute.carry_out(trial(root / "wait", fault="slow"), silent)


if __name__ == "__main__":
    COMMANDS = {"baseline": baseline, "build": build, "share": share, "memory": memory, "wait": wait}
    COMMANDS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])  # type: ignore[operator]
