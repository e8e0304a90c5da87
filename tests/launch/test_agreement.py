"""Ranks that do not run the same thing find out, and say what differs."""

import os

import pytest

from megatron_ext.errors import UserError
from megatron_ext.launch.agreement import check_agreement, statement_of
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.rendezvous import join_rendezvous
from tests.config.builders import small_config, small_tree
from tests.ranks import run_ranks


def outcome(rank: int, _world_size: int, differs: str) -> str:
    training = small_tree()["training"]
    if differs == "config" and rank == 1:
        training = training | {"batch_size": 2 * training["batch_size"]}
    os.environ.pop("NCCL_DEBUG", None)
    if rank == 2:
        os.environ.update({"variable": {"NCCL_DEBUG": "INFO"}, "secret": {"MY_TOKEN": "hush"}}.get(differs, {}))
        os.environ["NCCL_SOCKET_IFNAME"] = "eth7"  # a host's own business
    config = small_config(training=training, cluster={"environment": ["MY_*"]})
    rendezvous = join_rendezvous(rank_info(), seconds=60.0)
    try:
        check_agreement(rendezvous, config.model_dump(mode="json"), config.cluster.environment)
    except UserError as error:
        return str(error)
    return ""


def test_equal_ranks_agree() -> None:
    assert run_ranks(outcome, 3, "", init=False) == [""] * 3


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("config", ["rank 1 on host", "config.training.batch_size "]),
        ("variable", ["rank 2 on host", "the environment variable NCCL_DEBUG INFO", "has unset"]),
        ("secret", ["rank 2 on host", "MY_TOKEN (not shown, hash"]),
    ],
)
def test_a_difference_is_named_on_every_rank_and_no_secret_shown(differs: str, words: list[str]) -> None:
    (message,) = set(run_ranks(outcome, 3, differs, init=False))
    assert all(word in message for word in words), message
    assert "hush" not in message


def test_the_statement_has_versions_and_every_key() -> None:
    statement = statement_of(small_config().model_dump(mode="json"), ())
    assert {"Python", "torch", "deepspeed", "config"} <= set(statement)
    assert {"seed", "cluster"} <= set(statement["config"])
