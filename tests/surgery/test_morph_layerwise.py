"""Walking a checkpoint module by module gives the whole model's bits."""

from pathlib import Path

import pytest
import torch
from surgery_pico import pico_config, random_tensors, write_checkpoint

from recipes.checkpoint import load_student
from recipes.model.config import MoeConfig
from recipes.model.layerwise import Layerwise
from recipes.names import layer_tensor
from recipes.tensors import TensorReader
from vpstore.errors import RecipeRefused

MOE = MoeConfig(num_experts=8, num_groups=2, top_groups=2, expert_hidden_size=8, shared_hidden_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"attention": "tpa"}, {"attention": "tpa", "moe": MOE}])
def test_logits_are_the_students_bits(tmp_path: Path, changes: dict[str, object], dtype: torch.dtype) -> None:
    config = pico_config(**changes)
    write_checkpoint(tmp_path, config, random_tensors(config))
    reader = TensorReader(tmp_path)
    ids = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(40) // 17).expand(2, -1)
    walked = Layerwise(reader, config, dtype=dtype).logits([(ids, documents), (ids[:1], None)])
    whole = load_student(reader, config, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(walked[0], whole(ids, documents))
        assert torch.equal(walked[1], whole(ids[:1]))


def test_a_layer_with_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    config = pico_config()
    tensors = random_tensors(config)
    del tensors[layer_tensor(2, "mlp.fc2.bias")]
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(RecipeRefused) as caught:
        Layerwise(TensorReader(tmp_path), config).layer(2)
    assert caught.value.where == "layer 2"
    assert "mlp.fc2.bias" in caught.value.found
