"""The deepspeed section, tried with the example blocks of DeepSpeed's own documentation; other frameworks' names."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.foreign import ALIASES, hint_for, key_for, translate_data_efficiency, translate_legacy
from megatron_ext.config.loading import parse_layers
from megatron_ext.config.merging import ConfigLayer, dotted
from megatron_ext.config.messages import ConfigError, all_keys
from megatron_ext.config.run import RunConfig
from tests.config.builders import small_config, small_tree


def test_every_alias_leads_to_a_key_and_is_none_itself() -> None:
    keys = {dotted(path) for path in all_keys(RunConfig)}
    for alias, key in ALIASES.items():
        assert key in keys, f"{alias} -> {key}"
        assert alias not in keys
        assert alias == alias.lower()


@pytest.mark.parametrize(
    ("name", "key", "hint"),
    [
        ("--global-batch-size", "training.batch_size", ""),
        ("Max_LR", "learning_rate.peak", ""),
        ("train_iters", "training.duration", ' ({"steps": n} or {"tokens": n})'),
    ],
)
def test_a_flag_is_understood_and_hints_at_a_value_of_another_form(name: str, key: str, hint: str) -> None:
    assert (key_for(name), hint_for(key)) == (key, hint)
    assert key_for("something_else") is None


# The configuration file of DeepSpeed's curriculum learning tutorial, section 1.
TUTORIAL = {
    "train_batch_size": 4096,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.00015, "max_grad_norm": 1.0, "betas": [0.9, 0.95]}},
    "gradient_clipping": 1.0,
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    },
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 1024,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 15000, "difficulty_step": 8},
    },
}
LEGACY: dict[str, Any] = TUTORIAL["curriculum_learning"]  # type: ignore[assignment]
# Sections 1.2 and 1.3 of the same page.
ROOT = {
    "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 15000, "difficulty_step": 8, "root_degree": 2},
}
DISCRETE = {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1, 2, 3], "max_step": [5, 10]}}


def legacy(**changes: Any) -> dict[str, Any]:
    return {**LEGACY, **changes}


def data_efficiency(**metrics: Any) -> dict[str, Any]:
    learning = {"enabled": True, "curriculum_metrics": metrics}
    return {"enabled": True, "seed": 1234, "data_sampling": {"enabled": True, "curriculum_learning": learning}}


def problems(block: dict[str, Any], **sections: Any) -> list[str]:
    try:
        parse_layers([ConfigLayer("run.json", small_tree(deepspeed=block, **sections))])
    except ConfigError as error:
        return [problem.removeprefix("run.json: ") for problem in error.problems]
    return []


def test_the_tutorials_file_is_answered_key_by_key() -> None:
    assert problems(TUTORIAL) == [
        "deepspeed.train_batch_size may not be set here: write training.batch_size 4096",
        "deepspeed.gradient_accumulation_steps may not be set here: micro-batches follow from "
        "parallel.micro_batch_tokens",
        "deepspeed.steps_per_print may not be set here: write metrics.log_every 1",
        'deepspeed.optimizer may not be set here: write "optimizer": {"betas": [0.9, 0.95], "clip_grad": 1.0} and '
        "learning_rate.peak 0.00015",
        "deepspeed.gradient_clipping may not be set here: write optimizer.clip_grad 1.0",
        'deepspeed.fp16.enabled may not be set here: write training.precision "fp16"',
        'deepspeed.curriculum_learning may not be set here: write "curriculum": {"pacing": "linear", "start": 8, '
        '"end": 1024, "multiple": 8, "duration": {"steps": 15000}} instead',
    ]


def test_fixed_root_and_fixed_discrete_are_translated() -> None:
    wanted = {"pacing": "root", "degree": 2, "start": 8, "end": 1024, "multiple": 8, "duration": {"steps": 15000}}
    assert translate_legacy(legacy(**ROOT)).curriculum == wanted
    translated = translate_legacy(legacy(**DISCRETE))
    # "at step 1-5 difficulty 1 is used, at step 6-10 difficulty 2 is used, from step 11 difficulty 3 is used"
    stages = [{"seq_len": 1, "duration": {"steps": 5}}, {"seq_len": 2, "duration": {"steps": 5}}]
    assert translated.curriculum == {"pacing": "discrete", "stages": stages, "multiple": 1}
    assert translated.remarks == ("the last length, 3, is training.seq_len",)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 99), st.booleans())
def test_every_translated_schedule_is_a_valid_curriculum(
    lowest: int, highest: int, multiple: int, steps: int, root: bool
) -> None:
    schedule: dict[str, Any] = {"total_curriculum_step": steps, "difficulty_step": multiple, "root_degree": 3}
    kind = "fixed_root" if root else "fixed_linear"
    translated = translate_legacy(
        legacy(min_difficulty=lowest, max_difficulty=highest, schedule_type=kind, schedule_config=schedule)
    )
    if translated.curriculum is None:
        assert -(-lowest // multiple) > highest // multiple
        return
    text = re.search(r'write "curriculum": (\{.*\}) instead', str(translated))
    assert text
    pasted = json.loads(text[1])
    config = small_config(training={"seq_len": max(highest, 1)}, curriculum=pasted)
    assert config.model_dump(mode="json", exclude_none=True)["curriculum"] == pasted
    assert bool(translated.remarks) == (lowest % multiple > 0 or highest % multiple > 0)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=6, unique=True), st.data())
def test_every_translated_discrete_schedule_is_a_valid_curriculum(lengths: list[int], data: st.DataObject) -> None:
    count = len(lengths) - 1
    switches = sorted(data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count, unique=True)))
    schedule = {"difficulty": sorted(lengths), "max_step": switches}
    pasted = translate_legacy(legacy(schedule_type="fixed_discrete", schedule_config=schedule)).curriculum
    assert pasted is not None
    config = small_config(training={"seq_len": max(lengths)}, curriculum=pasted)
    assert config.curriculum.pacing == "discrete"
    assert sum(stage["duration"]["steps"] for stage in pasted["stages"]) == switches[-1]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (legacy(curriculum_type="vocab"), 'curriculum_type is "vocab"'),
        (legacy(schedule_type="custom"), 'schedule_type is "custom"'),
        (legacy(min_difficulty=None), "min_difficulty is null, not a positive whole number"),
        (legacy(min_difficulty="8"), 'min_difficulty is "8"'),
        (legacy(schedule_config={}), "difficulty_step is null"),
        (legacy(schedule_config=[]), "schedule_config is [], not an object"),
        (legacy(min_difficulty=10, max_difficulty=12), "no multiple of difficulty_step 8 between 10 and 12"),
        (
            legacy(schedule_type="fixed_discrete", schedule_config={"difficulty": [8], "max_step": []}),
            "difficulty has 1",
        ),
        (
            legacy(schedule_type="fixed_discrete", schedule_config={"difficulty": [8, 16, 24], "max_step": [9, 5]}),
            "max_step [9, 5] does not rise",
        ),
        (True, "curriculum_learning is true, not an object"),
    ],
)
def test_what_has_no_counterpart_says_why_and_what_to_write(block: Any, reason: str) -> None:
    [message] = problems({"curriculum_learning": block})
    assert reason in message
    assert 'write "curriculum": {"pacing": "linear"' in message


@pytest.mark.parametrize(("metric", "tail"), [("seqlen_truncate", "truncate"), ("seqlen_reshape", "recycle")])
def test_the_data_efficiency_librarys_lengths_are_translated(metric: str, tail: str) -> None:
    values = {
        "difficulty_type": "value",
        "clustering_type": "single_cluster",
        "min_difficulty": 80,
        "max_difficulty": 2048,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 110000, "difficulty_step": 8},
    }
    translated = translate_data_efficiency(data_efficiency(**{metric: values}))
    wanted = {"pacing": "linear", "start": 80, "end": 2048, "multiple": 8, "duration": {"steps": 110000}}
    assert translated.curriculum == wanted
    assert translated.remarks == (f'write "tail": "{tail}" in data',)


def test_other_metrics_of_the_data_efficiency_library_are_refused() -> None:
    [message] = problems({"data_efficiency": data_efficiency(vocabularyrarity={"min_difficulty": 1})})
    assert "vocabularyrarity" in message
    assert "only the sequence length is a curriculum here" in message


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"curriculum_learning": legacy(enabled=False)}, "it is not enabled"),
        ({"data_efficiency": {"enabled": False}}, "it turns on no curriculum"),
    ],
)
def test_a_block_that_is_off_is_to_be_removed(block: dict[str, Any], reason: str) -> None:
    assert problems(block) == [f"deepspeed.{next(iter(block))} may not be set here: remove it; {reason}"]


HARMLESS = {
    "zero_optimization": {
        "overlap_comm": False,
        "reduce_bucket_size": 500000000,
        "allgather_bucket_size": 500000000,
        "contiguous_gradients": True,
    },
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True},
    "wall_clock_breakdown": True,
    "communication_data_type": "fp32",
}


@pytest.mark.parametrize(
    ("block", "sections"),
    [
        (HARMLESS, {}),
        ({"fp16": {"initial_scale_power": 12, "hysteresis": 4}}, {"training": {"precision": "fp16"}}),
        # Overlapped communication passes where DeepSpeed allows it, details of offloading with offloading.
        ({"zero_optimization": {"overlap_comm": True}}, {"parallel": {"zero_stage": 2}}),
        (
            {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}},
            {"parallel": {"offload_optimizer": "cpu"}},
        ),
    ],
)
def test_harmless_settings_pass(block: dict[str, Any], sections: dict[str, Any]) -> None:
    assert small_config(deepspeed=block, **sections).deepspeed == block


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage may not be set here: write parallel.zero_stage 2",
        ),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm is true with parallel.zero_stage 1"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
            'offload_optimizer.device may not be set here: write parallel.offload_optimizer "cpu"',
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'write parallel.offload_params "none" or "cpu"'),
        (
            {"zero_optimization": {"offload_param": {"pin_memory": True}}},
            'offload_param is given with parallel.offload_params "none"',
        ),
        ({"zero_optimization": True}, "deepspeed.zero_optimization is true: expected an object"),
        ({"fp16": {"loss_scale": 0}}, 'deepspeed.fp16 is given with training.precision "fp32"'),
        ({"bf16": {"enabled": True}}, 'write training.precision "bf16"'),
        ({"fp16": {"enabled": False}}, "deepspeed.fp16.enabled may not be set here: remove it"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 1000}}},
            'write "learning_rate": {"peak": 0.001, "warmup": {"steps": 1000}}',
        ),
        ({"optimizer": {"type": "Lamb"}}, '"Lamb" is not supported'),
        ({"optimizer": 3}, "write the optimizer section"),
        ({"train_micro_batch_size_per_gpu": 4}, "write parallel.micro_batch_tokens"),
        ({"amp": {"enabled": True}}, "DeepSpeed no longer has it"),
        ({"wall_clock_brakedown": True}, "did you mean deepspeed.wall_clock_breakdown?"),
        (
            {"zero_optimization": {"mics_shard_size": 2}},
            "mics_shard_size may not be set here: DeepSpeed no longer has it",
        ),
        ({"qqq": True}, "is not among the settings passed to DeepSpeed: these are aio,"),
    ],
)
def test_what_other_sections_decide_is_refused_with_the_key_to_use(block: dict[str, Any], message: str) -> None:
    [problem] = problems(block)
    assert message in problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["enabled", "params", "type", "stage", "device", "offload_param", "overlap_comm", "lr"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=50)
@given(
    st.sampled_from(
        ["zero_optimization", "fp16", "optimizer", "scheduler", "curriculum_learning", "data_efficiency", "seed", "x"]
    ),
    json_values,
)
def test_no_block_however_odd_breaks_the_check(key: str, value: Any) -> None:
    for problem in problems({key: value}):
        assert problem.startswith(f"deepspeed.{key}")
