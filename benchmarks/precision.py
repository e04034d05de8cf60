"""Does bfloat16 train as well as float32? The same start and data, 100 steps each, and two controls that must differ.

Place: beside `train`, which times the loop. The data asks for what the window must get exactly right: each row begins
with 128 random ids, and each later token is, half of the time, the one 128 places before it, which stands 127 places
before the token that predicts it: the last one that a window of 128 shows. The other half is random, so that a model
must know how sure to be, which it does not if attention gives it more than it was trained with. A prelude teaches the
task with offsets that take a large share of the mass; its weights are where every branch begins, at a rate too low to
learn anew in 100 steps what was taken away. A branch without the softmax offset, or with a window of 127, is a model
that errs where a careless kernel would: if those do not fall outside of the tolerance, the comparison shows nothing.

Use: python -m benchmarks.precision [--cases tiny full] [--output FILE]      VPSTORE_DEVICE=cuda for `full`
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from recipes import runtime

runtime.fix_numerics(2)  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.train_sides import training_params  # noqa: E402
from recipes.data.batches import AlignedDataset  # noqa: E402
from recipes.data.megatron_dataset import IndexedDatasetWriter  # noqa: E402
from recipes.model.config import StudentConfig  # noqa: E402
from recipes.model.transformer import Student  # noqa: E402
from recipes.train.loop import Phase, Scratch, Trainer  # noqa: E402
from recipes.train.state import Identity  # noqa: E402

PERIOD: Final = 128
IDS: Final = 64
KEPT: Final = 0.5  # of the tokens repeat the one a period before
OFFSET: Final = 6.0  # where the offsets begin
BRANCH_RATE: Final = 1 / 500  # of the prelude's
BRANCH_STEPS: Final = 100
LAST: Final = 20
TOLERANCE_NATS: Final = 0.01
RESULTS: Final = Path(__file__).parent / "results" / "precision.json"


@dataclass(frozen=True)
class Case:
    """A model, and how much of the task it sees."""

    config: StudentConfig
    tokens: int  # of a row
    rows: int  # of a step
    prelude_steps: int
    rate: float  # of matrices; the others' is a quarter


def _real(hidden: int, layers: int, ffn: int) -> StudentConfig:
    return StudentConfig(hidden_size=hidden, num_layers=layers, ffn_hidden_size=ffn, attention="tpa")


CASES: Final = {
    "tiny": Case(_real(64, 4, 32), 512, 2, 500, 0.02),
    "full": Case(_real(1024, 28, 512), 2048, 2, 300, 0.01),
}


def write_echoes(folder: Path, *, tokens: int, rows: int) -> None:
    """A data set of rows that echo, half of the time, what stood a period before; only what can be known counts."""
    generator = np.random.default_rng(7)
    (folder / "train").mkdir(parents=True)
    arrays = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
    mask = np.zeros(tokens, np.uint8)
    mask[PERIOD - 1 : -1] = 1  # of the label, one token ahead
    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(IndexedDatasetWriter(folder / "train" / f"text_{part}", dtype))
            for part, dtype in arrays.items()
        }
        for _ in range(rows):
            row = generator.integers(1000, 1000 + IDS, tokens, dtype=np.int32)
            is_kept = generator.random(tokens) < KEPT
            for start in range(PERIOD, tokens, PERIOD):
                here, before = slice(start, start + PERIOD), slice(start - PERIOD, start)
                row[here] = np.where(is_kept[here], row[before], row[here])
            for part, values in (("tokens", row), ("lossmask", mask), ("span", np.zeros(tokens, np.uint8))):
                writers[part].add_document(values)


def fresh(config: StudentConfig) -> Student:
    """Drawn weights, and offsets that take a share of the mass."""
    model = Student(config)
    model.draw(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.softmax_offset.fill_(OFFSET)
    return model


def trained(
    model: Student, case: Case, data: Path, *, precision: str, steps: int, share: float = 1.0, frozen: str = "-"
) -> list[float]:
    """Train in place, at a share of the case's rate; the loss of every step."""
    table = training_params(precision=precision, rows=case.rows, steps=steps, tokens=case.tokens).model_dump(
        mode="json"
    )
    rates = {f"{kind}_rate": share * case.rate / 4 for kind in ("embedding", "head", "vector", "frequency", "residual")}
    table["optimizer"] |= {**rates, "matrix_rate": share * case.rate}
    table["loss"]["chunk"] = 4096
    params = training_params(table=table)
    phase = Phase("all", 0, lambda name: not name.endswith(frozen))
    scratch = Scratch(data / "state", Identity({}, table))
    trainer = Trainer(model, params, AlignedDataset(data, "train"), scratch, phases=(phase,))
    trainer.save = lambda: None  # type: ignore[method-assign]  # nothing is taken up here
    trainer.run(lambda *_: None)
    return [row["loss"] for row in trainer.rows]


def run_case(name: str) -> dict[str, Any]:
    """The prelude, then every branch from where it ended."""
    case, device = CASES[name], runtime.device()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        write_echoes(data, tokens=case.tokens, rows=case.rows * (case.prelude_steps + BRANCH_STEPS))
        model = fresh(case.config).to(device)
        prelude = trained(model, case, data, precision="bfloat16", steps=case.prelude_steps)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        losses = {"prelude": prelude}
        for branch in ("float32", "bfloat16", "no offset", "window 127"):
            config = case.config.model_copy(update={"window": 127}) if branch == "window 127" else case.config
            model = fresh(config).to(device)
            model.load_state_dict(start)
            frozen = "-"
            if branch == "no offset":
                frozen = "softmax_offset"
                with torch.no_grad():
                    for layer in model.layers:
                        layer.self_attn.softmax_offset.fill_(-30.0)
            precision = "float32" if branch == "float32" else "bfloat16"
            losses[branch] = trained(
                model, case, data, precision=precision, steps=BRANCH_STEPS, share=BRANCH_RATE, frozen=frozen
            )
            print(name, branch, [round(value, 4) for value in losses[branch][::20]], flush=True)
    last = {branch: statistics.fmean(values[-LAST:]) for branch, values in losses.items()}
    apart = {branch: abs(last[branch] - last["float32"]) for branch in losses if branch not in ("prelude", "float32")}
    return {
        "case": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "mean_of_the_last_20": {branch: round(value, 5) for branch, value in last.items()},
        "apart_from_float32": {branch: round(value, 5) for branch, value in apart.items()},
        "is_as_good": apart["bfloat16"] <= TOLERANCE_NATS,
        "controls_fall_outside": all(apart[branch] > TOLERANCE_NATS for branch in ("no offset", "window 127")),
        "losses": {branch: [round(value, 4) for value in values] for branch, values in losses.items()},
    }


def main() -> None:
    """Run the cases and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = []
    for name in given.cases:
        found.append(run_case(name))
        print(json.dumps({key: value for key, value in found[-1].items() if key != "losses"}), flush=True)
        given.output.write_text(json.dumps({"schema": 1, "cases": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
