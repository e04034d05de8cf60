"""What this machine's arithmetic gives: a digest for each operation that the recipes build on.

Place in the path: beside the recipes, in no key. Two builds under one key that differ were made by machines that
compute differently, or by a recipe that is not a function; equal tables on both machines leave the second only.

Invariants: inputs are integers divided by powers of two, so they are exact everywhere; the settings are those of a
stage (`runtime.fix_numerics`), so a difference here is one that a stage would see.

Example:
    $ python -m recipes.arithmetic --threads 2
    5c1d1e3a06c2  all
    d01a24b9aa71  matmul float32
    …
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from recipes import runtime

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS = 12
_SIZES = ((64, 64, 64), (257, 64, 1024), (512, 128, 300), (1000, 777, 333))  # around and off the kernels' blocks
ALL = "all"


def fingerprint(*, threads: int) -> dict[str, str]:
    """Digest the results of every operation.

    Args:    threads: as a profile's `runtime.threads`.
    Returns: twelve hex digits of BLAKE3 for each operation; `all` covers them all and comes first.
    Raises:  VpstoreError: torch was imported under other settings.
    """
    runtime.fix_numerics(threads)
    found = {name: _digest(result()) for name, result in _operations()}
    text = "".join(f"{name} {digest}\n" for name, digest in found.items())
    return {ALL: blake3(text.encode()).hexdigest(length=_DIGITS // 2), **found}


def _digest(results: Any) -> str:
    state = blake3()
    for tensor in results if isinstance(results, (tuple, list)) else (results,):
        state.update(tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest(length=_DIGITS // 2)


def _operations() -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    for dtype in (torch.float32, torch.float64):
        yield from _in_dtype(str(dtype).removeprefix("torch."), dtype)
    yield "generator", lambda: torch.randn(100_003, generator=torch.Generator().manual_seed(7))
    yield "training", _training


def _in_dtype(word: str, dtype: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    import torch.nn.functional as F

    from recipes.ops.roots import binary_log, square_root

    x = exact(700, 1000, dtype=dtype)
    positive = x.abs() + 0.125
    square = exact(200, 200, dtype=dtype)
    definite = square @ square.T / 64 + 8 * torch.eye(200, dtype=dtype)
    heads = exact(2 * 8 * 64, 128, dtype=dtype).view(2, 8, 64, 128)
    yield f"matmul {word}", lambda: [exact(n, k, dtype=dtype) @ exact(k, m, dtype=dtype) for n, k, m in _SIZES]
    yield (
        f"matmul transposed {word}",
        lambda: [exact(n, k, dtype=dtype) @ exact(m, k, dtype=dtype).T for n, k, m in _SIZES],
    )
    yield f"matrix by vector {word}", lambda: x @ exact(1, 1000, dtype=dtype)[0]
    yield f"batched matmul {word}", lambda: torch.bmm(heads[0], heads[1].mT)
    yield f"einsum {word}", lambda: torch.einsum("bhtd,bhsd->bhts", heads, heads)
    yield f"attention {word}", lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    for name in ("eigh", "inv", "svd"):
        yield f"{name} {word}", partial(getattr(torch.linalg, name), definite)
    yield f"solve {word}", lambda: torch.linalg.solve(definite, square)
    for name in ("exp", "exp2", "rsqrt", "reciprocal", "sigmoid"):
        yield f"{name} {word}", partial(getattr(torch, name), positive)
    for name in ("sin", "cos", "tanh", "relu"):
        yield f"{name} {word}", partial(getattr(torch, name), x)
    yield f"square root {word}", lambda: square_root(positive)
    if dtype is torch.float32:  # the only one that recipes take logarithms of tensors in
        yield f"logarithms {word}", lambda: (torch.log(positive), binary_log(positive))
    else:  # the only one that they factorise matrices in
        yield f"cholesky {word}", lambda: torch.linalg.cholesky(definite)
    yield f"silu {word}", lambda: F.silu(x)
    yield f"softmax {word}", lambda: (torch.softmax(x, -1), torch.logsumexp(x, -1))
    yield f"sums {word}", lambda: (x.sum(), x.mean(0), x.norm(), x.std(-1), x.cumsum(0), x.square().mean(-1))


def _training() -> list[Tensor]:
    """Twenty steps of a small network under the chain's own optimizer arithmetic: products, backward passes, roots."""
    import torch
    import torch.nn.functional as F

    from recipes.ops.roots import square_root

    weights = [exact(128, 64).div(8).requires_grad_(), exact(64, 128).div(8).requires_grad_()]
    states = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    inputs = exact(256, 64)
    for _ in range(20):
        loss = F.cross_entropy(F.linear(F.silu(F.linear(inputs, weights[0])), weights[1]), inputs.argmax(-1))
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient, (mean, square) in zip(weights, gradients, states, strict=True):
                mean.lerp_(gradient, 0.125)
                square.mul_(0.75).addcmul_(gradient, gradient, value=0.25)
                weight.addcdiv_(mean, square_root(square).add_(1e-8), value=-0.01)
    return weights


def exact(rows: int, columns: int, *, dtype: Any = None) -> Tensor:
    """Numbers between -1 and 1 that no rounding touches: a multiplicative sequence, divided by a power of two."""
    import torch

    index = torch.arange(1, rows * columns + 1, dtype=torch.int64)
    mixed = (index * 2654435761 + (index >> 7) * 40503) % (1 << 20)
    return (mixed - (1 << 19)).to(dtype or torch.float32).div(1 << 19).view(rows, columns)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="digests of what this machine's arithmetic gives")
    parser.add_argument("--threads", type=int, default=2, help="as the profile's runtime.threads")
    for name, digest in fingerprint(threads=parser.parse_args().threads).items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()
