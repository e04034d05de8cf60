"""The cross-entropy over 201,088 ids beside that of well-kept packages, on one GPU: time, memory, error, equal bits.

Place: what docs/decisions/0014-training-on-a-gpu.md goes by. Each side makes the loss and both gradients of 16,384
rows of 1,024 numbers in bfloat16 against a float32 head; errors are against float64 on the first 512 rows.

Use: python -m benchmarks.head_losses [--output FILE]      with liger-kernel and cut-cross-entropy installed
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from recipes.train.head_loss import weighted_losses

VOCABULARY: Final = 201088
VALID: Final = 200019
RESULTS: Final = Path(__file__).parent / "results" / "head_losses.json"
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the loop calls it."""
    weight = torch.full((len(labels),), 1.0 / len(labels), device=labels.device)
    return weighted_losses(hidden, head, labels, weight, chunk=8192)[0]


def liger(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """liger-kernel's fused linear cross-entropy; it has no share of the vocabulary to leave out."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    found: torch.Tensor = LigerFusedLinearCrossEntropyLoss()(head.to(hidden.dtype), hidden, labels)
    return found


def cut(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """cut-cross-entropy at its defaults, which leave out gradients below the dtype's resolution."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, head.to(hidden.dtype), labels)


def cut_exact(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """cut-cross-entropy with every gradient."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, head.to(hidden.dtype), labels, impl="cce_exact")


SIDES: Final[dict[str, Loss]] = {"ours": ours, "liger": liger, "cut": cut, "cut, exact": cut_exact}


def gradients(side: Loss, tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Loss and both gradients."""
    hidden, head, labels = tables
    loss = side(hidden, head, labels)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def measured(side: Loss, tables: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Median time of five, peak memory beside the tables, and whether two runs give the same bits."""
    first = gradients(side, tables)
    second = gradients(side, tables)
    is_same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    del first, second
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        gradients(side, tables)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": round(statistics.median(times), 2), "gib": round(peak / (1 << 30), 2), "same_bits_twice": is_same}


def errors(side: Loss, tables: tuple[torch.Tensor, ...]) -> list[float]:
    """Relative errors of loss and gradients on a few rows; the ids that only ours leaves out are out of reach."""
    hidden, head, labels = (tables[0][:512].detach().requires_grad_(), tables[1], tables[2][:512])
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    scores = exact[0] @ exact[1].T
    loss = torch.nn.functional.cross_entropy(scores[:, : VALID if side is ours else VOCABULARY], labels)
    wanted = (loss.detach(), *torch.autograd.grad(loss, exact))
    found = gradients(side, (hidden, head, labels))
    return [round(float((a.double() - b).norm() / b.norm()), 6) for a, b in zip(found, wanted, strict=True)]


def main() -> None:
    """Measure every side that is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(16384, 1024, device="cuda", generator=generator).bfloat16().requires_grad_()
    head = (torch.randn(VOCABULARY, 1024, device="cuda", generator=generator) * 0.03).requires_grad_()
    labels = torch.randint(VALID, (16384,), device="cuda", generator=generator)
    rows = []
    for name, side in SIDES.items():
        try:
            row = {
                "side": name,
                **measured(side, (hidden, head, labels)),
                "errors": errors(side, (hidden, head, labels)),
            }
        except Exception as error:  # a package that is not here, or does not run here
            row = {"side": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    found = {"schema": 1, "card": torch.cuda.get_device_name(), "torch": torch.__version__, "sides": rows}
    given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
