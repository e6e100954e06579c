"""A frozen model cut at a layer, and one that does not fit where it runs."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from trainer.errors import ConfigError
from trainer.models.pooling import masked_mean, pooled
from trainer.teachers.frozen import FrozenStates, spread

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
)


def small() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(CONFIG.__class__(**CONFIG.to_dict())).eval()


def test_blocks_on_the_disk_give_the_states_of_the_whole_model_in_memory(tmp_path):
    tokens = torch.randint(0, 50, (3, 7))
    with torch.no_grad():
        states = small()(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer in (2, 3, -1):
        model = spread(small(), layer=layer, memory={"cpu": "60KiB"}, offload=tmp_path)
        assert "disk" in model.hf_device_map.values()
        assert any(value.is_meta for value in model.parameters())
        with torch.no_grad():
            found = FrozenStates(model, layer=layer)(input_ids=tokens)
        assert torch.allclose(found, states[layer], atol=1e-6)
    for memory, offload, message in (
        ("60KiB", None, "give a folder"),
        ("1KiB", tmp_path, "not even a block"),
    ):
        with pytest.raises(ConfigError, match=message):
            spread(small(), memory={"cpu": memory}, offload=offload)
    whole = FrozenStates(spread(small(), layer=2), layer=2)
    assert torch.equal(whole(input_ids=tokens), FrozenStates(small(), layer=2)(input_ids=tokens))


def test_pooling_looks_at_the_positions_of_the_mask_alone():
    states = torch.randn(4, 6, 5)
    mask = torch.tensor(
        [[1, 1, 0, 0, 0, 0], [1] * 6, [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    ).bool()
    hidden = states.masked_fill(~mask[..., None], float("nan"))
    for row in range(4):
        kept = states[row][mask[row]]
        for how, expected in (("mean", kept.mean(0)), ("last", kept[-1]), ("cls", kept[0])):
            assert torch.allclose(pooled(hidden, mask, how)[row], expected, atol=1e-6)
        assert torch.allclose(masked_mean(states, mask)[row], kept.mean(0), atol=1e-6)
