"""Time OMP at the real size: 98,863 anchors of width 2880, 64 atoms a target; random normal rows.

Random rows are the worst case for the screen: no atom stands out. The supports are exact all the same; this checks some
of them against the plain float64 algorithm.

Use: python -m benchmarks.omp_full_shape [--device cuda] [--targets 4096] [--atoms 98863] [--width 2880] [--k 64]
Prints one JSON object; times are medians over the runs, after one warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from recipes.ops.omp import Dictionary


def reference_support(atoms_ND: torch.Tensor, target_D: torch.Tensor, k: int) -> list[int]:
    """The algorithm as it is written down: largest inner product, least squares on the support, repeat."""
    chosen: list[int] = []
    residual_D = target_D
    for _ in range(k):
        scores_N = (atoms_ND @ residual_D).abs()
        scores_N[chosen] = -1
        chosen.append(int(scores_N.argmax()))
        basis_DS = atoms_ND[chosen].T
        residual_D = target_D - basis_DS @ torch.linalg.lstsq(basis_DS, target_D[:, None]).solution[:, 0]
    return chosen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("targets", 4096), ("atoms", 98863), ("width", 2880), ("k", 64), ("runs", 3), ("checked", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    atoms_ND = torch.randn(args.atoms, args.width, generator=generator).to(args.device)
    targets_BD = torch.randn(args.targets, args.width, generator=generator).to(args.device)
    dictionary = Dictionary(atoms_ND)
    found = dictionary.solve(targets_BD[:64], atoms=args.k)
    seconds = []
    for _ in range(args.runs):
        started = time.perf_counter()
        found = dictionary.solve(targets_BD, atoms=args.k)
        found.residual_B.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    exact = atoms_ND.double()
    equal = [
        reference_support(exact, targets_BD[row].double(), args.k) == found.support_BK[row].tolist()
        for row in range(args.checked)
    ]
    figures = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "ms_per_target": round(1000 * statistics.median(seconds) / args.targets, 4),
        "seconds": [round(value, 3) for value in seconds],
        "supports_equal_to_float64": f"{sum(equal)} of {len(equal)}",
        **{name: getattr(args, name) for name in ("targets", "atoms", "width", "k")},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
