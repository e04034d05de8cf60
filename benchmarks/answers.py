"""Measure sampled answers at full shape: greedy, from a cache, as the gates of a training ask for them.

Place: beside `train`. Weights are random, so no answer ends before its last token: the longest that the gate allows.
Two shares are held against whole passes over prompts and answers: how often the cache says what a whole pass in the
same numbers says (in float32 that should be always), and how often bfloat16 says what float32 says.

Use: VPSTORE_DEVICE=cuda python -m benchmarks.answers [--cases dense moe] [--rows 64] [--new 1024] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

from recipes import runtime

runtime.fix_numerics(8)  # before torch is imported

import torch  # noqa: E402

from benchmarks.projects import REPOSITORY  # noqa: E402
from benchmarks.train_sides import CASES, drawn_on  # noqa: E402
from recipes.model.generation import Limits, generate  # noqa: E402
from recipes.model.precision import REFERENCE, Numerics  # noqa: E402
from recipes.model.stream import Stream  # noqa: E402
from recipes.model.transformer import Student  # noqa: E402
from recipes.train.losses import VALID_VOCAB  # noqa: E402

RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "answers.json"
NARROW: Final = Numerics(torch.bfloat16, is_grouped=True)
_COMPARED: Final = 4  # rows that are held against whole passes


def prompts_of(rows: int) -> list[list[int]]:
    """Random ids, of 32 to 512 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(32, 513, (rows,), generator=generator).tolist()
    return [torch.randint(0, VALID_VOCAB, (length,), generator=generator).tolist() for length in lengths]


def timed(
    model: Student, prompts: list[list[int]], limits: Limits, numerics: Numerics
) -> tuple[float, list[list[int]]]:
    """Seconds, captures included, and the answers."""
    started = time.perf_counter()
    answers = generate(model, prompts, limits, numerics=numerics)
    return time.perf_counter() - started, answers


@torch.no_grad()
def said_by_whole_pass(model: Student, prompt: list[int], answer: list[int], numerics: Numerics) -> torch.Tensor:
    """What one pass over prompt and answer would say at each place of the answer."""
    device = model.head_weight.device
    ids_1T = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    state = Stream.of_rows(ids_1T.shape[1], device=device)
    hidden_TH = model.hidden_of(ids_1T, state, numerics)[0, len(prompt) - 1 :]
    return (hidden_TH @ model.head_weight[:VALID_VOCAB].to(hidden_TH.dtype).T).argmax(-1).cpu()


def share(model: Student, prompts: list[list[int]], answers: list[list[int]], numerics: Numerics) -> float:
    """How often a whole pass says the token that stands there."""
    pairs = list(zip(prompts, answers, strict=True))[:_COMPARED]
    same = [said_by_whole_pass(model, *pair, numerics) == torch.tensor(pair[1]) for pair in pairs]
    return float(torch.cat(same).double().mean())


def run_case(name: str, *, rows: int, new: int) -> dict[str, Any]:
    """All figures of one model."""
    config = CASES[name].config
    assert config is not None
    device = runtime.device()
    model = drawn_on(config, device).eval()
    prompts, limits = prompts_of(rows), Limits(new, (), VALID_VOCAB)
    seconds, answers = timed(model, prompts, limits, NARROW)
    found = {
        "case": name, "what": CASES[name].what, "rows": rows, "new_tokens": new, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "bfloat16_s": round(seconds, 2),
        "bfloat16_cache_agrees": share(model, prompts, answers, NARROW),
        "bfloat16_says_what_float32_says": share(model, prompts, answers, REFERENCE),
        "memory_gib": round(torch.cuda.max_memory_allocated() / (1 << 30), 1) if device == "cuda" else None,
    }  # fmt: skip
    if config.moe is None:
        seconds, answers = timed(model, prompts, limits, REFERENCE)
        found |= {"float32_s": round(seconds, 2), "float32_cache_agrees": share(model, prompts, answers, REFERENCE)}
    return found


def main() -> None:
    """Run the cases and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["dense", "moe"], choices=[n for n in CASES if CASES[n].config])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = []
    for name in given.cases:
        found.append(run_case(name, rows=given.rows, new=given.new))
        print(json.dumps(found[-1]), flush=True)
        given.output.write_text(json.dumps({"schema": 1, "cases": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
