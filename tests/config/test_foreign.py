"""Foreign names lead to keys that exist."""

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


def test_spelling_variants_of_command_line_flags_are_understood() -> None:
    assert key_for("--global-batch-size") == "training.batch_size"
    assert key_for("Max_LR") == "learning_rate.peak"
    assert key_for("something_else") is None


def test_a_hint_is_only_given_where_the_value_has_another_form() -> None:
    assert hint_for("training.duration") == ' ({"tokens": n} or {"steps": n})'
    assert hint_for("training.seq_len") == ""
