"""Presets against the published sizes; every file under configs/ loads; recipes hold the paper's numbers."""

import json
from pathlib import Path

import pytest

from megatron_ext.config.loading import load_config, preset_names
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.pacings import DiscretePacing, LinearPacing
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


CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = {"base.json", "large_batch.json"}
# A comparison of several runs is no run config; tests/experiments/test_config.py reads it.
EXPERIMENTS = sorted(
    path
    for path in (CONFIGS / "experiments").glob("*.json")
    if {"variants", "grid"} & json.loads(path.read_text()).keys()
)
RUN_CONFIGS = sorted(set(CONFIGS.glob("**/*.json")) - set(EXPERIMENTS))
RECIPES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.glob("**/*.json")
    if path.name not in PARTS and path.relative_to(CONFIGS).parts[0] != "experiments"
)


def load(name: str) -> RunConfig:
    return load_config(CONFIGS / name)


def test_every_recipe_of_the_table_is_there() -> None:
    gpt2 = {
        f"gpt2/{size}_{kind}.json"
        for size in ("117m", "1.5b")
        for kind in ("baseline", "slw", "large_batch", "batch_size_warmup", "shortformer")
    }
    gpt3 = {f"gpt3/{name}.json" for name in ("125m_original", "125m_slw_mild", "125m_slw_paper", "1.3b_slw")}
    assert gpt2 | gpt3 | {"demo/shakespeare.json"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_has_a_run_directory_of_its_own(name: str) -> None:
    config = load(name)
    others = [load(other).run_dir for other in RECIPES if other != name]
    assert config.run_dir not in others


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("demo")])
def test_common_numbers_of_a_family(name: str) -> None:
    config = load(name)
    family = name.split("/", maxsplit=1)[0]
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.eps == 1e-8
    assert config.optimizer.clip_grad == 1.0
    assert config.optimizer.weight_decay == {"gpt2": 0.01, "gpt3": 0.1}[family]
    assert config.training.seq_len == {"gpt2": 1024, "gpt3": 2048}[family]
    assert config.learning_rate.decay == "cosine"
    tokens = 157_286_400_000 if family == "gpt2" else 300_000_000_000
    assert config.training.duration.tokens == (tokens if "slw_paper" not in name else tokens // 10)


@pytest.mark.parametrize(
    ("name", "batch_size", "peak", "start", "duration"),
    [
        ("gpt2/117m_baseline.json", 512, 1.5e-4, None, None),
        ("gpt2/1.5b_baseline.json", 512, 1.5e-4, None, None),
        ("gpt2/1.5b_slw.json", 4096, 6e-4, 64, 45_000),
        ("gpt3/125m_original.json", 256, 6e-4, None, None),
        ("gpt3/125m_slw_mild.json", 2048, 2.4e-3, 72, 27_638),
        ("gpt3/1.3b_slw.json", 4096, 8e-4, 80, 13_767),
    ],
)
def test_batch_size_learning_rate_and_curriculum_are_the_papers(
    name: str, batch_size: int, peak: float, start: int | None, duration: int | None
) -> None:
    config = load(name)
    assert config.training.batch_size == batch_size
    assert config.learning_rate.peak == peak
    if start is None:
        assert config.curriculum.pacing == "constant"
        return
    assert isinstance(config.curriculum, LinearPacing)
    assert (config.curriculum.start, config.curriculum.duration.steps) == (start, duration)


@pytest.mark.parametrize("name", ["gpt3/125m_slw_mild.json", "gpt3/125m_slw_paper.json", "gpt3/1.3b_slw.json"])
def test_warmup_tokens_become_steps_at_the_start_length(name: str) -> None:
    config = load(name)
    assert isinstance(config.curriculum, LinearPacing)
    assert config.learning_rate.warmup is not None
    assert config.learning_rate.warmup.steps == 375_000_000 // (config.curriculum.start * config.training.batch_size)


def test_the_original_gpt3_recipe_warms_up_batch_and_rate_in_tokens() -> None:
    config = load("gpt3/125m_original.json")
    warmup = config.training.batch_size_warmup
    assert warmup is not None
    assert (warmup.start, warmup.duration.tokens) == (16, 4_000_000_000)
    assert config.learning_rate.warmup is not None
    assert config.learning_rate.warmup.tokens == 375_000_000
    assert config.learning_rate.decay_duration is not None
    assert config.learning_rate.decay_duration.tokens == 260_000_000_000
    assert config.learning_rate.min == 6e-5


@pytest.mark.parametrize("size", ["117m", "1.5b"])
def test_slw_and_its_comparators_differ_in_the_warmup_alone(size: str) -> None:
    kinds = ("large_batch", "slw", "batch_size_warmup", "shortformer")
    slw, shortformer = load(f"gpt2/{size}_slw.json"), load(f"gpt2/{size}_shortformer.json")
    assert isinstance(slw.curriculum, LinearPacing)
    assert isinstance(shortformer.curriculum, DiscretePacing)
    assert [stage.duration for stage in shortformer.curriculum.stages] == [slw.curriculum.duration]
    rest = [
        load(f"gpt2/{size}_{kind}.json").model_dump(
            exclude={"name": True, "curriculum": True, "training": {"batch_size_warmup"}}
        )
        for kind in kinds
    ]
    assert all(other == rest[0] for other in rest)
