"""The donor model against stock transformers and against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from recipes.model.config import DonorConfig
from recipes.model.donor import Donor, DonorAttention, DonorState, document_mask, positions_within, rotary_factors


def pico(**changes: object) -> DonorConfig:
    values: dict[str, object] = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40, "vocab_size": 97}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return DonorConfig(**(values | changes))  # type: ignore[arg-type]


def randomised(config: DonorConfig, seed: int = 0) -> Donor:
    donor = Donor(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in donor.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return donor.eval()


def stock(donor: Donor) -> Qwen3ForCausalLM:
    config = donor.config
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            **config.model_dump(exclude={"rope_theta"}),
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(donor.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    assert ("lm_head.weight" in missing) == config.tie_word_embeddings
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "theta"), [(4, 2, 1e6), (6, 1, 1e4), (2, 2, 5e5)])
def test_logits_equal_stock_qwen3(tied: bool, heads: int, kv_heads: int, theta: float) -> None:
    config = pico(tie_word_embeddings=tied, num_attention_heads=heads, num_key_value_heads=kv_heads, rope_theta=theta)
    donor = randomised(config, heads)
    ids = torch.randint(97, (3, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = donor(ids), stock(donor)(ids).logits
        hidden = stock(donor).model(ids).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(donor.forward_hidden(ids), hidden, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close_to_stock_bfloat16() -> None:
    donor = randomised(pico()).to(torch.bfloat16)
    theirs = stock(donor).to(torch.bfloat16)
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, expected = donor(ids).float(), theirs(ids).logits.float()
    assert (ours - expected).norm() / expected.norm() < 0.02


def test_packed_documents_equal_separate_rows() -> None:
    donor = randomised(pico())
    lengths = [1, 7, 12, 3]
    ids = torch.randint(97, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    documents = torch.repeat_interleave(torch.tensor([9, 2, 5, 2]), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = donor(ids, documents).split(lengths, dim=1)
        rows = [donor(row) for row in ids.split(lengths, dim=1)]
        crossed = donor(ids)
    for together, alone in zip(packed, rows, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (crossed[:, 1:] - torch.cat(rows, dim=1)[:, 1:]).abs().max() > 0.1  # without documents, text leaks


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_positions_and_mask_equal_a_slow_loop(rows: list[list[int]]) -> None:
    documents = torch.tensor(rows)
    positions, mask = positions_within(documents), document_mask(documents)
    for b, row in enumerate(rows):
        start = 0
        for t, number in enumerate(row):
            start = t if t and number != row[t - 1] else start
            assert positions[b, t] == t - start
            assert mask[b, 0, t].tolist() == [start <= key <= t for key in range(len(row))]


def slow_attention(attention: DonorAttention, q: Tensor, k: Tensor, v: Tensor, theta: float) -> Tensor:
    """Formula by formula, one query and one head at a time, in float64 and one row only."""
    tokens, heads, width = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(tokens, heads, width, dtype=torch.float64)

    def turned(x: Tensor, position: int) -> Tensor:
        pairs = [complex(x[i], x[i + width // 2]) for i in range(width // 2)]
        angles = [position * theta ** (-2 * i / width) for i in range(width // 2)]
        spun = [z * complex(math.cos(a), math.sin(a)) for z, a in zip(pairs, angles, strict=True)]
        return torch.tensor([z.real for z in spun] + [z.imag for z in spun], dtype=torch.float64)

    for t in range(tokens):
        for h in range(heads):
            scores = torch.stack([turned(q[t, h], t) @ turned(k[s, h // group], s) for s in range(t + 1)])
            out[t, h] = torch.softmax(scores / width**0.5, 0) @ v[: t + 1, h // group].double()
    return out.flatten(1)


def test_attend_equals_a_slow_loop() -> None:
    config = pico(rope_theta=100.0)
    attention = randomised(config).layers[0].self_attn
    x = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(4))
    state = DonorState(*rotary_factors(torch.arange(6)[None], config, torch.float32), None)
    with torch.no_grad():
        q, k, v = attention.project(x)
        assert q.shape == (1, 6, 4, 16)
        assert k.shape == v.shape == (1, 6, 2, 16)
        mixed = attention.attend(q, k, v, state)
        torch.testing.assert_close(
            mixed[0].double(), slow_attention(attention, q[0], k[0], v[0], 100.0), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(attention(x, state), attention.o_proj(mixed))


def test_walking_layer_by_layer_is_the_forward_pass() -> None:
    donor = randomised(pico())
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        x, state = donor.start(ids)
        for layer in donor.layers:
            normed = layer.input_layernorm(x)
            x = x + layer.self_attn.o_proj(layer.self_attn.attend(*layer.self_attn.project(normed), state))
            normed = layer.post_attention_layernorm(x)
            inner = torch.nn.functional.silu(layer.mlp.gate(normed)) * layer.mlp.up(normed)
            x = x + layer.mlp.down(inner)
        assert torch.equal(donor.model.norm(x), donor.forward_hidden(ids))


def test_the_real_donor_has_its_published_size() -> None:
    with torch.device("meta"):
        donor = Donor(DonorConfig(hidden_size=1024, num_hidden_layers=28, intermediate_size=3072))
    assert sum(weight.numel() for weight in donor.parameters()) == 596_049_920
    body = sum(weight.numel() for name, weight in donor.named_parameters() if "embed_tokens" not in name)
    assert body == 440_467_456
