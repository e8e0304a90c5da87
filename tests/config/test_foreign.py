"""Foreign names lead to keys that exist."""

import pytest

from megatron_ext.config.foreign import ALIASES, hint_for, key_for
from megatron_ext.config.merging import dotted
from megatron_ext.config.messages import all_keys
from megatron_ext.config.run import RunConfig


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
