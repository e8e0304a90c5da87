"""Experiment files: what runs they describe, and what is said of wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.config.messages import ConfigError
from megatron_ext.errors import UserError
from megatron_ext.experiments.config import Experiment, load_experiment, variants_of
from tests.config.test_recipes import EXPERIMENTS

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"
BASE = {
    "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
    "data": {"sources": [{"prefix": "corpus"}]},
    "training": {"seq_len": 64, "batch_size": 4, "duration": {"steps": 100}},
    "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 50}},
    "learning_rate": {"peak": 1e-3},
}


def load(folder: Path, **changes: Any) -> Experiment:
    content = {"name": "study", "base": "base.json", "output_dir": "runs/study", "variants": {"base": {}}} | changes
    (folder / "base.json").write_text(json.dumps(BASE))
    (folder / "study.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return load_experiment(folder / "study.json")


def test_every_variant_is_the_base_changed_as_a_file_that_extends_it_would(tmp_path: Path) -> None:
    root: dict[str, Any] = {"curriculum": {"pacing": "root", "start": 16, "duration": {"tokens": 5000}}}
    clip: dict[str, Any] = {"optimizer": {"clip_grad": 0.5}}
    experiment = load(tmp_path, seeds=[3, 1], variants={"root": root, "clip": clip})
    assert [(run.variant, run.seed) for run in experiment.runs] == [("root", 3), ("root", 1), ("clip", 3), ("clip", 1)]
    for run in experiment.runs:
        changes = {"root": root, "clip": clip}[run.variant]
        own = {"name": f"{run.variant}-seed{run.seed}", "output_dir": "runs/study", "seed": run.seed}
        (tmp_path / "one.json").write_text(json.dumps({"extends": "base.json", **changes, **own}))
        assert run.config == load_config(tmp_path / "one.json")


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    constant = {"pacing": "constant"}
    grid = {"learning_rate.peak": [0.001, 0.002], "training.batch_size": [8], "curriculum": [constant, {"start": 16}]}
    experiment = load(tmp_path, variants=None, grid=grid)
    assert [(run.variant, run.config.learning_rate.peak, run.config.curriculum.pacing) for run in experiment.runs] == [
        ("peak=0.001_batch_size=8_curriculum=1", 0.001, "constant"),
        ("peak=0.001_batch_size=8_curriculum=2", 0.001, "linear"),
        ("peak=0.002_batch_size=8_curriculum=1", 0.002, "constant"),
        ("peak=0.002_batch_size=8_curriculum=2", 0.002, "linear"),
    ]
    assert all(run.config.training.batch_size == 8 for run in experiment.runs)
    twice = load(tmp_path, variants=None, grid={"optimizer.eps": [1e-8], "learning_rate.min": [0.0]})
    assert [variant.name for variant in variants_of(twice.config)] == ["eps=1e-08_min=0.0"]


def test_variants_and_a_grid_are_every_variant_at_every_point(tmp_path: Path) -> None:
    variants = {"base": {}, "root": {"curriculum": {"pacing": "root", "start": 8, "duration": {"steps": 9}}}}
    grid = {"training.batch_size": [4, 8], "learning_rate.peak": [0.001, 0.01]}
    experiment = load(tmp_path, variants=variants, grid=grid)
    found = {
        run.variant: (run.config.curriculum.pacing, run.config.training.batch_size, run.config.learning_rate.peak)
        for run in experiment.runs
    }
    assert found == {
        f"{name}_batch_size={size}_peak={peak}": (pacing, size, peak)
        for name, pacing in (("base", "linear"), ("root", "root"))
        for size in (4, 8)
        for peak in (0.001, 0.01)
    }


def test_a_variant_may_be_a_file_that_extends_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    root: dict[str, Any] = {"curriculum": {"pacing": "root", "start": 16, "duration": {"tokens": 5000}}}
    (folder / "root.json").write_text(json.dumps({"extends": "../base.json", "name": "own", **root}))
    as_file = load(tmp_path, variants={"root": "parts/root.json"}, seeds=[3])
    written = load(tmp_path, variants={"root": root}, seeds=[3])
    assert as_file.runs == written.runs
    (folder / "other.json").write_text(json.dumps(BASE | {"optimizer": {"eps": 1e-6}}))
    with pytest.raises(UserError, match=r"variants.other is parts/other.json, which does not extend .*base.json"):
        load(tmp_path, variants={"other": "parts/other.json"})
    for missing in ({"variants": {"other": "nowhere.json"}}, {"base": "nowhere.json"}):
        with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
            load(tmp_path, **missing)


def test_an_experiment_may_extend_another(tmp_path: Path) -> None:
    load(tmp_path, variants={"a": {"optimizer": {"eps": 1e-6}}, "b": {}})
    (tmp_path / "more.json").write_text(json.dumps({"extends": "study.json", "name": "more", "seeds": [7]}))
    more = load_experiment(tmp_path / "more.json")
    assert [(run.variant, run.seed) for run in more.runs] == [("a", 7), ("b", 7)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bse": "x"}, ["bse: unknown key", "did you mean base?"]),
        ({"base": None}, ["base is missing", "relative to this file"]),
        ({"seeds": []}, ["seeds is []", "at least 1 item"]),
        ({"seeds": [1, 1]}, ["seeds is [1, 1]", "every seed once"]),
        ({"seeds": ["1"]}, ['seeds[0] is "1"', "write 1 without quotes"]),
        ({"variants": None}, ["write variants", "or grid"]),
        ({"variants": {"a": 3}}, ["variants.a"]),
        ({"variants": {}}, ["variants is {}"]),
        ({"variants": {"a/b": {}}}, ['variants has "a/b"', "letters"]),
        ({"variants": {"a": {"seed": 3}}}, ["variants.a.seed", "use seeds of the experiment"]),
        ({"variants": None, "grid": {"seed": [3]}}, ["grid.seed", "use seeds of the experiment"]),
        ({"variants": None, "grid": {"a..b": [3]}}, ['grid has "a..b"', "section.key"]),
        ({"variants": None, "grid": {"model": [{}], "model.init_std": [1]}}, ["model.init_std, which is inside it"]),
        ({"variants": None, "grid": {"learning_rate.peak": []}}, ["grid.learning_rate.peak is []"]),
        ({"variants": None, "grid": {"learning_rate.peak": [1, 1]}}, ["every value once"]),
        ({"run_name": "{variant}", "seeds": [1, 2]}, ["run_name", "{seed}", "share a directory"]),
        ({"run_name": "x", "variants": {"a": {}, "b": {}}}, ["run_name", "{variant}", "share a directory"]),
        ({"run_name": "{variant}-{lr}"}, ["run_name", "not ['lr']"]),
        ({"run_name": "{variant"}, ["run_name", "{variant}-seed{seed}"]),
        ({"run_name": "../{variant}"}, ["run_name", "letters"]),
        ({"name": "a b"}, ['name is "a b"']),
        ({"nproc": 0}, ["nproc is 0", "more than 0"]),
    ],
)
def test_a_wrong_file_is_named_with_key_and_remedy(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, **changes)
    for word in [*words, "study.json"]:
        assert word in str(raised.value)


def test_all_wrong_variants_are_listed_at_once_each_with_its_name(tmp_path: Path) -> None:
    variants = {"good": {}, "typo": {"optimizer": {"clip": 1.0}}, "wrong": {"training": {"seq_len": 60}}}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, seeds=[1, 2], variants=variants)
    assert len(raised.value.problems) == 2
    assert "study.json (variant typo): optimizer.clip: unknown key; did you mean optimizer.clip_grad?" in str(
        raised.value
    )
    assert "variant wrong" in raised.value.problems[1]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path: Path) -> None:
    directories = set()
    for run in load_experiment(path).runs:
        run.config.plan()
        directories.add(run.config.run_dir)
    assert len(directories) == len(load_experiment(path).runs)


def test_every_comparator_changes_one_section_of_the_base() -> None:
    experiment = load_experiment(CONFIGS / "comparators.json")
    base = load_config(CONFIGS / "base.json").model_dump(exclude={"name", "output_dir", "seed"})
    for run in experiment.runs:
        own = run.config.model_dump(exclude={"name", "output_dir", "seed"})
        changed = {section for section in base if own[section] != base[section]}
        # Recycling is the growing length with another use of the rest of each sample.
        assert len(changed - ({"data"} if run.variant == "slw-recycle" else set())) == (run.variant != "baseline")
