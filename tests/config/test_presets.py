"""The shipped model sizes against the published ones."""

from pathlib import Path

import pytest

from megatron_ext.config.loading import load_config, preset_names
from tests.config.builders import write

# GPT-2: layers and width of Radford et al. 2019, table 2, heads of the released models. GPT-3: Brown et al. 2020,
# table 2.1, with the two corrections that make heads times head size the width (1.3B, 13B).
SIZES = {
    "gpt2-117m": (12, 768, 12, 0.1, 124e6),
    "gpt2-345m": (24, 1024, 16, 0.1, 355e6),
    "gpt2-774m": (36, 1280, 20, 0.1, 774e6),
    "gpt2-1.5b": (48, 1600, 25, 0.1, 1.56e9),
    "gpt3-125m": (12, 768, 12, 0.0, 125e6),
    "gpt3-350m": (24, 1024, 16, 0.0, 356e6),
    "gpt3-760m": (24, 1536, 16, 0.0, 760e6),
    "gpt3-1.3b": (24, 2048, 16, 0.0, 1.3e9),
    "gpt3-2.7b": (32, 2560, 32, 0.0, 2.65e9),
    "gpt3-6.7b": (32, 4096, 32, 0.0, 6.7e9),
    "gpt3-13b": (40, 5120, 40, 0.0, 12.85e9),
    "gpt3-175b": (96, 12288, 96, 0.0, 174.6e9),
}


def test_every_published_size_is_shipped_and_no_other() -> None:
    assert set(preset_names()) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_the_published_model(name: str, tmp_path: Path) -> None:
    layers, width, heads, dropout, parameters = SIZES[name]
    seq_len = 1024 if name.startswith("gpt2") else 2048
    tree = {
        "extends": f"preset:{name}",
        "data": {"sources": [{"prefix": "corpus"}]},
        "training": {"seq_len": seq_len, "batch_size": 8, "duration": {"steps": 100}},
        "learning_rate": {"peak": 1e-4},
    }
    model = load_config(write(tmp_path / "run.json", tree)).model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (layers, width, heads)
    assert model.hidden_dropout == model.attention_dropout == dropout
    assert model.tie_embeddings
    blocks = layers * (12 * width**2 + 13 * width)
    total = blocks + (model.vocab_size + seq_len + 2) * width
    assert total == pytest.approx(parameters, rel=0.02)
