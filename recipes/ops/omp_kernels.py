"""What a GPU does for orthogonal matching pursuit between two matrix products; Triton kernels.

Place in the path: below `recipes.ops.omp_cuda`, which owns the buffers and says what they hold.

Legend: one program a target unless its function says otherwise. A block is BLOCK atoms; WIDTH columns are read at a
time; LIST blocks and CAP atoms are listed at most; KEPT is the number of atoms a target, rounded up to a power of two.

Invariants: sums have one fixed order that depends neither on the company of a target nor on where an atom stands, so
equal atoms get equal scores; what decides is float64; no size is chosen by timing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# A score was rounded to float16: by 2^-11 of it, or 2^-25 below the normal numbers. These are a little more.
_MORE = tl.constexpr(1.0006)
_LESS = tl.constexpr(0.9994)
_TINY = tl.constexpr(1e-7)


@triton.jit
def block_bounds(bits, norm, slack, upper, lower, blocks, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Of each block the largest score an atom may have; of GROUP blocks (a program) the largest that one must have."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = part * GROUP + tl.arange(0, GROUP)
    place = row * blocks * BLOCK + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # Without its sign, a float16 is in the order of its bits.
    best = tl.max(tl.load(bits + place, mask=(block < blocks)[:, None], other=0) & 0x7FFF, axis=1)
    score = best.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    reach = tl.load(norm + block, mask=block < blocks, other=0.0) * tl.load(slack + row) + _TINY
    tl.store(upper + row * blocks + block, score * _MORE + reach, mask=block < blocks)
    tl.store(lower + row * tl.num_programs(1) + part, tl.max(score * _LESS - reach, axis=0))


@triton.jit
def list_blocks(
    upper, lower, floor, listed, count, blocks, parts, BLOCKS: tl.constexpr, PARTS: tl.constexpr, LIST: tl.constexpr
):
    """The blocks that may hold the leader, in order: those that reach the largest lower bound. All, if that is zero."""
    row = tl.program_id(0).to(tl.int64)
    part, block = tl.arange(0, PARTS), tl.arange(0, BLOCKS)
    least = tl.max(tl.load(lower + row * parts + part, mask=part < parts, other=0.0), axis=0)
    tl.store(floor + row, least)
    is_hit = tl.load(upper + row * blocks + block, mask=block < blocks, other=-1.0) >= least
    place = tl.cumsum(is_hit.to(tl.int32), axis=0) - 1
    tl.store(listed + row * LIST + place, block, mask=is_hit & (place < LIST))
    tl.store(count + row, tl.sum(is_hit.to(tl.int32), axis=0))


@triton.jit
def list_atoms(
    score,
    norm,
    slack,
    floor,
    listed,
    count,
    found,
    number,
    atoms,
    blocks,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    CAP: tl.constexpr,
):
    """The atoms of those blocks that may lead, in order; `number` is CAP + 1 where there may be more."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, LIST)
    filled = tl.load(count + row)
    block = tl.load(listed + row * LIST + slot, mask=slot < filled, other=0)
    atom = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_atom = (slot < filled)[:, None] & (atom < atoms)
    value = tl.abs(tl.load(score + row * blocks * BLOCK + atom, mask=is_atom, other=0.0).to(tl.float32))
    reach = tl.load(norm + block) * tl.load(slack + row) + _TINY
    is_hit = is_atom & (value * _MORE + reach[:, None] >= tl.load(floor + row))
    flat = tl.reshape(is_hit.to(tl.int32), [LIST * BLOCK])
    place = tl.cumsum(flat, axis=0) - 1
    tl.store(found + row * CAP + place, tl.reshape(atom, [LIST * BLOCK]), mask=(flat > 0) & (place < CAP))
    total = tl.sum(flat, axis=0)
    tl.store(number + row, tl.where((filled > LIST) | (total > CAP), CAP + 1, total))


@triton.jit(do_not_specialize=["step"])
def rank(
    table,
    residual,
    found,
    number,
    support,
    is_open,
    chosen,
    score,
    tally,
    step,
    D,
    K,
    CAP: tl.constexpr,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The listed atom with the largest float64 score, of equal ones the first; -1 closed, -2 too many to list.

    `tally` counts targets that are open, that had more than one atom listed, and too many.
    """
    row = tl.program_id(0).to(tl.int64)
    listed = tl.load(number + row)
    is_alive = tl.load(is_open + row) != 0
    kept = tl.arange(0, KEPT)
    taken = tl.load(support + row * K + kept, mask=kept < step, other=-1)
    best = tl.full([], -1.0, tl.float64)
    signed = tl.full([], 0.0, tl.float64)
    leader = tl.full([], -1, tl.int64)
    for one in range(tl.where(is_alive & (listed <= CAP), listed, 0)):
        atom = tl.load(found + row * CAP + one).to(tl.int64)
        total = tl.zeros([WIDTH], tl.float64)
        for first in range(0, D, WIDTH):
            place = first + tl.arange(0, WIDTH)
            value = tl.load(table + atom * D + place, mask=place < D, other=0.0).to(tl.float64)
            total += value * tl.load(residual + row * D + place, mask=place < D, other=0.0)
        inner = tl.sum(total, axis=0)
        is_taken = tl.max((taken == atom).to(tl.int32), axis=0) > 0
        size = tl.where(is_taken, -1.0, tl.abs(inner))
        leader = tl.where(size > best, atom, leader)
        signed = tl.where(size > best, inner, signed)
        best = tl.maximum(size, best)
    tl.store(chosen + row, tl.where(is_alive & (listed > CAP), -2, leader))
    tl.store(score + row, signed)
    tl.atomic_add(tally + step * 3, is_alive.to(tl.int32))
    tl.atomic_add(tally + step * 3 + 1, (is_alive & (listed > 1)).to(tl.int32))
    tl.atomic_add(tally + step * 3 + 2, (is_alive & (listed > CAP)).to(tl.int32))


@triton.jit(do_not_specialize=["step"])
def take(table, chosen, score, norm, least, used, step, D, K, WIDTH: tl.constexpr):
    """Copy the chosen row to the target's own; a score that is nothing but rounding closes the target."""
    row = tl.program_id(0).to(tl.int64)
    atom = tl.load(chosen + row)
    if (atom >= 0) & (tl.abs(tl.load(score + row)) > least * tl.load(norm + row)):
        for first in range(0, D, WIDTH):
            place = first + tl.arange(0, WIDTH)
            value = tl.load(table + atom * D + place, mask=place < D, other=0.0)
            tl.store(used + (row * K + step) * D + place, value, mask=place < D)
    else:
        tl.store(chosen + row, -1)


@triton.jit(do_not_specialize=["step"])
def inner_products(used, chosen, inner, step, D, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of the new row with ROWS rows a program, the new one among them."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tl.load(chosen + row) >= 0:
        total = tl.zeros([ROWS, WIDTH], tl.float64)
        for first in range(0, D, WIDTH):
            place = first + tl.arange(0, WIDTH)
            new = tl.load(used + (row * K + step) * D + place, mask=place < D, other=0.0).to(tl.float64)
            mask = (each <= step)[:, None] & (place < D)[None, :]
            old = tl.load(used + (row * K + each[:, None]) * D + place[None, :], mask=mask, other=0.0)
            total += old.to(tl.float64) * new[None, :]
        tl.store(inner + row * K + each, tl.sum(total, axis=1), mask=each <= step)


@triton.jit(do_not_specialize=["step"])
def advance(
    chosen,
    score,
    inner,
    basis,
    support,
    coefficients,
    left,
    limit,
    is_open,
    gain,
    step,
    K,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One Gram-Schmidt step in coefficients: row q of `basis` gives the q-th direction as a combination of atoms."""
    row = tl.program_id(0).to(tl.int64)
    atom = tl.load(chosen + row)
    if atom >= 0:
        kept = tl.arange(0, KEPT)
        product = tl.load(inner + row * K + kept, mask=kept < step, other=0.0)
        squared = tl.load(inner + row * K + step)
        column = tl.zeros([KEPT], tl.float64)
        for first in range(0, step, ROWS):
            each = first + tl.arange(0, ROWS)
            mask = (each < step)[:, None] & (kept < step)[None, :]
            tile = tl.load(basis + (row * K + each[:, None]) * K + kept[None, :], mask=mask, other=0.0)
            along = tl.sum(tile * product[None, :], axis=1)
            squared -= tl.sum(along * along, axis=0)
            column -= tl.sum(tile * along[:, None], axis=0)
        scale = tl.rsqrt(tl.maximum(squared, 1e-300))
        column = tl.where(kept == step, scale, column * scale)
        length = tl.load(score + row) * scale
        before = tl.load(coefficients + row * K + kept, mask=kept < step, other=0.0)
        tl.store(coefficients + row * K + kept, before + length * column, mask=kept <= step)
        tl.store(basis + (row * K + step) * K + kept, column, mask=kept <= step)
        tl.store(support + row * K + step, atom)
        rest = tl.load(left + row) - length * length
        tl.store(left + row, rest)
        tl.store(is_open + row, (rest > tl.load(limit + row)).to(tl.int8))
        tl.store(gain + row, length)
    else:
        tl.store(is_open + row, tl.full([], 0, tl.int8))
        tl.store(gain + row, tl.full([], 0.0, tl.float64))


@triton.jit(do_not_specialize=["steps"])
def residuals(
    used,
    basis,
    gain,
    left,
    is_open,
    residual,
    rounded,
    norm,
    slack,
    steps,
    D,
    K,
    UNIT: tl.constexpr,
    spread,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Subtract the newest direction; round the residual, brought to length UNIT, and measure what that lost.

    `slack` times the length of an atom bounds how far a score may be off; `spread` is what the atoms' own rounding and
    the product's sums add for each unit of the rounded residual.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(gain + row)
    is_alive = tl.load(is_open + row) != 0
    scale = tl.where(is_alive, UNIT * tl.rsqrt(tl.maximum(tl.load(left + row), 1e-300)), 0.0)
    total = tl.zeros([WIDTH], tl.float64)
    lost = tl.zeros([WIDTH], tl.float64)
    sent = tl.zeros([WIDTH], tl.float64)
    for first in range(0, D, WIDTH):
        place = first + tl.arange(0, WIDTH)
        value = tl.load(residual + row * D + place, mask=place < D, other=0.0)
        if length != 0.0:
            direction = tl.zeros([WIDTH], tl.float64)
            for one in range(0, steps, ROWS):
                each = one + tl.arange(0, ROWS)
                weight = tl.load(basis + (row * K + steps - 1) * K + each, mask=each < steps, other=0.0)
                mask = (each < steps)[:, None] & (place < D)[None, :]
                atom = tl.load(used + (row * K + each[:, None]) * D + place[None, :], mask=mask, other=0.0)
                direction += tl.sum(atom.to(tl.float64) * weight[:, None], axis=0)
            value -= length * direction
            tl.store(residual + row * D + place, value, mask=place < D)
        unit = value * scale
        short = unit.to(tl.float32).to(tl.float16)
        tl.store(rounded + row * D + place, short, mask=place < D)
        back = short.to(tl.float64)
        total += value * value
        lost += (unit - back) * (unit - back)
        sent += back * back
    tl.store(norm + row, _root(tl.sum(total, axis=0)))
    bound = _root(tl.sum(lost, axis=0)) + spread * _root(tl.sum(sent, axis=0))
    tl.store(slack + row, (bound * 1.001).to(tl.float32))


@triton.jit
def _root(squared):
    """Square root, 0 of 0."""
    return tl.where(squared > 0.0, squared * tl.rsqrt(tl.maximum(squared, 1e-300)), 0.0)
