"""Fused forms against the reference: FlexAttention, composed heads, grouped experts; on a GPU gradients and bits."""

from __future__ import annotations

import pytest
import torch
from student_builder import SMALL_MOE, apart, config_of, ids_of, student_of
from torch import Tensor

from recipes.model import flex
from recipes.model.factors import composed
from recipes.model.grape import alibi_slopes
from recipes.model.grouped import dispatch, grouped_experts
from recipes.model.health import balance_loss
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.stream import Stream, visible_keys
from recipes.model.tiles import Heads, causal_tiles, join_tiles, sink_attention
from recipes.model.tpa import compose

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WIDE_MOE = SMALL_MOE.model_copy(update={"expert_hidden_size": 8})  # rows of 16 bytes, as the grouped product wants them
MODELS = {
    "compat": config_of("gqa", hidden=64),
    "real": config_of("tpa", hidden=64),
    "moe": config_of("tpa", hidden=64, moe=WIDE_MOE),
}


def packed(rows: int, tokens: int, *, seed: int = 3, share: float = 0.01) -> Tensor:
    """Document numbers with a border every hundred tokens or so; the last row is one document."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(rows, tokens, generator=generator) < share).cumsum(-1)
    documents[-1] = 0
    return documents


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # plain torch is what a CPU has
@pytest.mark.parametrize("tokens", [64, 127, 128, 129, 300, 512])
@pytest.mark.parametrize(("window", "uses_alibi"), [(None, False), (None, True), (128, False)])
def test_flex_attention_is_that_of_the_tiles(tokens: int, window: int | None, uses_alibi: bool) -> None:
    q, k, v = drawn(2, tokens, 8, 128, seed=1), drawn(2, tokens, 2, 128, seed=2), drawn(2, tokens, 2, 128, seed=3)
    offset_Q, state = drawn(8, seed=4), Stream.of(packed(2, tokens))
    slopes = torch.unflatten(alibi_slopes(8), 0, (2, -1)) if uses_alibi else None
    tiles = causal_tiles(Heads(torch.unflatten(q, 2, (2, -1)), k, v), state, window=window, slopes_KG=slopes)
    expected = join_tiles([sink_attention(tile, offset_Q.view(2, -1)) for tile in tiles], tokens=tokens)
    masks = flex.block_masks(state.run_BT, rows=2, tokens=tokens, window=128, device=q.device)
    found = flex.sink_attention((q, k, v), offset_Q, masks.of(window), uses_alibi=uses_alibi)
    assert apart(found, expected) < 1e-6
    other = flex.sink_attention((q, k, v), offset_Q - 20, masks.of(window), uses_alibi=uses_alibi)
    assert apart(other, expected) > 0.01  # the offset takes part


def listed(count: Tensor, order: Tensor) -> Tensor:
    """Blocks named in a mask's lists, as a table."""
    named = torch.zeros(order.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in order.shape[:-1])):
        row = tuple(place.tolist())
        named[row][order[row][: int(count[row])].long()] = True
    return named[:, 0]


@pytest.mark.parametrize("tokens", [100, 128, 130, 640, 1000])
@pytest.mark.parametrize("window", [None, 128, 127, 257])
def test_blocks_are_listed_if_a_pair_in_them_is_seen_and_whole_if_all_are(tokens: int, window: int | None) -> None:
    run_BT = packed(3, tokens)
    mask = flex._block_mask(run_BT, window)
    blocks, size = -(-tokens // flex.BLOCK), flex.BLOCK
    index_T = torch.arange(tokens)
    seen = visible_keys(index_T, index_T, window=window) & (run_BT[:, :, None] == run_BT[:, None])
    padded = torch.zeros(3, blocks * size, blocks * size, dtype=torch.bool)
    padded[:, :tokens, :tokens] = seen
    by_block = padded.view(3, blocks, size, blocks, size).transpose(2, 3)
    partial, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial | whole, by_block.any(-1).any(-1))
    assert not (partial & whole).any()
    rows = torch.zeros(blocks * size, dtype=torch.bool)
    rows[:tokens] = True
    is_place = (rows[:, None] & rows).view(blocks, size, blocks, size).transpose(1, 2)
    assert torch.equal(whole, (by_block | ~is_place).all(-1).all(-1) & by_block.any(-1).any(-1))


def test_composed_heads_are_those_of_the_products() -> None:
    a, b, bias = drawn(2, 5, 32, seed=1), drawn(2, 5, 512, seed=2), drawn(8, 128, seed=3)
    ours, theirs = ([x.clone().requires_grad_() for x in (a, b, bias)] for _ in range(2))
    found, expected = composed(*ours, rank=4), compose(theirs[0], theirs[1], rank=4) + theirs[2]
    assert apart(found, expected) < 1e-6
    slope = drawn(2, 5, 8, 128, seed=4)
    gradients = (torch.autograd.grad(out, of, slope) for out, of in ((found, ours), (expected, theirs)))
    for one, other in zip(*gradients, strict=True):
        assert apart(one, other) < 1e-6


EXPERTS, TOP = 16, 2


def chosen(kind: str, tokens: int = 251) -> Tensor:
    """Experts of each token: even, one with ten times the mean, or some without any."""
    share = torch.ones(EXPERTS)
    if kind == "skewed":
        share[3] = 10 * share.sum() / EXPERTS
    if kind == "empty":
        share[:5] = 0
    return torch.multinomial(share.expand(tokens, -1), TOP, generator=torch.Generator().manual_seed(1))


def by_expert(x: Tensor, weights: list[Tensor], expert_M: Tensor) -> Tensor:
    """One expert after the other, in the dtype that is given."""
    w1, b1, w2, b2 = weights
    parts = [
        torch.relu(x[expert_M == e] @ w1[e].T + b1[e]).square() @ w2[e].T + b2[e] for e in range(EXPERTS)
    ]  # rows are sorted by expert
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["even", "skewed", "empty"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_grouped_experts_are_those_of_a_loop(kind: str, device: str) -> None:
    where = dispatch(chosen(kind).to(device), EXPERTS)
    shapes = ((EXPERTS, 24, 64), (EXPERTS, 24), (EXPERTS, 64, 24), (EXPERTS, 64))
    weights = [drawn(*shape, seed=n).mul_(0.3).to(device).requires_grad_() for n, shape in enumerate(shapes)]
    rows = drawn(where.order_M.shape[0], 64, seed=9).to(device)
    narrow = rows.bfloat16().requires_grad_()
    found = grouped_experts(narrow, (weights[0], weights[1], weights[2], weights[3]), where)
    exact = [x.detach().double().requires_grad_() for x in (narrow, *weights)]
    expected = by_expert(exact[0], exact[1:], where.expert_M)
    assert apart(found.double(), expected) < 0.01
    slope = drawn(*found.shape, seed=10).to(device)
    ours = torch.autograd.grad(found, [narrow, *weights], slope.bfloat16())
    theirs = torch.autograd.grad(expected, exact, slope.bfloat16().double())
    for one, other in zip(ours, theirs, strict=True):
        assert apart(one.double(), other) < 0.02
    assert [one.dtype for one in ours] == [torch.bfloat16] + 4 * [torch.float32]


@pytest.mark.parametrize("name", MODELS)
def test_a_narrow_stream_stays_near_the_wide_one(name: str) -> None:
    student, ids, documents = student_of(MODELS[name], dtype=torch.float32), ids_of(2, 200), packed(2, 200)
    with torch.no_grad():
        wide, _ = student.hidden_and_state(ids, documents)
        narrow, state = student.hidden_and_state(ids, documents, numerics=Numerics(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert 1e-4 < apart(narrow, wide) < 0.1
    assert state.rotary is None or state.rotary.cos_BT1F.dtype == torch.float32
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}


def gradients(student, ids, documents, numerics):  # type: ignore[no-untyped-def]
    """Hidden states and all gradients of one pass."""
    hidden, state = student.hidden_and_state(ids, documents, collect=True, numerics=numerics)
    slope = torch.randn(hidden.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    loss = (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * slope).sum() / hidden.shape[1] + balance_loss(
        state.routing
    ).to(hidden.device)
    return [hidden.detach(), *torch.autograd.grad(loss, list(student.model.parameters()))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "tokens"), [("compat", 300), ("real", 300), ("real", 1000)])
def test_fused_gradients_in_float32_are_as_exact_as_those_of_the_tiles(name: str, tokens: int) -> None:
    exact, student = (student_of(MODELS[name], dtype=dtype).cuda() for dtype in (torch.float64, torch.float32))
    ids, documents = ids_of(2, tokens).cuda(), packed(2, tokens)
    expected = gradients(exact, ids, documents, REFERENCE)
    by_tiles = gradients(student, ids, documents, REFERENCE)
    found = gradients(student, ids, documents, Numerics(torch.float32, is_fused=True))
    for one, tiles, wanted in zip(found, by_tiles, expected, strict=True):
        assert apart(one.double(), wanted) < max(1e-5, 2 * apart(tiles.double(), wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["real", "moe"])
def test_fused_passes_in_bfloat16_are_near_and_give_the_same_bits_twice(name: str) -> None:
    student, ids, documents = (
        student_of(MODELS[name], dtype=torch.float32).cuda(),
        ids_of(2, 300).cuda(),
        packed(2, 300),
    )
    narrow = Numerics(torch.bfloat16, is_fused=True)
    first, second = (gradients(student, ids, documents, narrow) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    by_tiles = gradients(student, ids, documents, Numerics(torch.bfloat16))
    expected = gradients(student_of(MODELS[name], dtype=torch.float64).cuda(), ids, documents, REFERENCE)
    # Rounding sends some tokens to other experts, so single tensors scatter; a wrong one is apart by its own length.
    ours = [apart(one.double(), wanted) for one, wanted in zip(first, expected, strict=True)]
    tiles = [apart(one.double(), wanted) for one, wanted in zip(by_tiles, expected, strict=True)]
    assert sum(ours) < 1.5 * sum(tiles)
    assert max(ours) < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("heads", "rank"), [(8, 4), (2, 2)])
def test_the_kernel_of_the_factors_agrees_with_float64(heads: int, rank: int, is_compiled: bool) -> None:
    width = heads * rank + rank * 128
    fused = drawn(3, 70, width + 40, seed=1).cuda().bfloat16()[..., :width].requires_grad_()  # rows with a gap
    bias, slope = drawn(heads, 128, seed=2).cuda().requires_grad_(), drawn(3, 70, heads, 128, seed=3).cuda()

    def out(x: Tensor) -> Tensor:
        a, b = torch.split(x, [heads * rank, rank * 128], dim=-1)
        return composed(a, b, bias, rank=rank)

    call = torch.compile(out, dynamic=False, fullgraph=True) if is_compiled else out
    found = call(fused)
    exact = fused.detach().double().requires_grad_()
    a, b = torch.split(exact, [heads * rank, rank * 128], dim=-1)
    expected = compose(a, b, rank=rank) + bias.double()
    assert apart(found.double(), expected) < 0.01
    ours = torch.autograd.grad(found, (fused, bias), slope.bfloat16())
    theirs = torch.autograd.grad(expected, (exact, bias), slope.bfloat16().double())
    for one, other in zip(ours, theirs, strict=True):
        assert apart(one.double(), other.double()) < 0.01
