"""The cluster section: what it takes, and that it changes nothing about what is computed."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ext.config.cluster import ClusterConfig
from tests.config.builders import small_config


def test_names_and_globs_of_variables_are_taken() -> None:
    parsed = ClusterConfig.model_validate_json('{"environment": ["HF_HOME", "WANDB_*", "*"], "interface": "ib0"}')
    assert parsed.environment == ("HF_HOME", "WANDB_*", "*")


@pytest.mark.parametrize(
    "section",
    [
        {"environment": ("A=B",)},
        {"environment": ("A B",)},
        {"environment": ("",)},
        {"interface": "eth0; reboot"},
        {"interface": ""},
        {"heartbeat_seconds": -1.0},
        {"preflight": {"when": "sometimes"}},
        {"preflight": {"min_matmul_share": 1.5}},
    ],
)
def test_what_is_no_name_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClusterConfig.model_validate(section)


def test_a_run_may_go_on_with_another_cluster_section() -> None:
    changed = small_config(cluster={"heartbeat_seconds": 5.0, "environment": ["A"]})
    assert changed.digest() == small_config().digest()
