"""What the ranks' answers mean; hosts that are really different are in tests/cluster."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.launch.preflight import Preflight
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import process_group
from megatron_ext.runtime.rendezvous import Rendezvous, join_rendezvous
from tests.config.builders import small_config
from tests.ranks import run_ranks

CPU = Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")


def examine(rendezvous: Rendezvous, config: RunConfig) -> Preflight:
    limits, precision = config.cluster.preflight, config.training.precision
    return Preflight(rendezvous, limits, config.run_dir, device=CPU, precision=precision)


def outcome(rank: int, _world_size: int, folder: str, differs: str, limits: dict[str, float]) -> list[str]:
    """Report, or the one message, of a rank of which rank 1 may be odd."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and differs == "clock":
            late = SimpleNamespace(**vars(time) | {"time": lambda: time.time() - 1800})  # half an hour
            patch.setattr("megatron_ext.launch.preflight.time", late)
        if rank == 1 and differs == "device":
            patch.setattr("megatron_ext.launch.preflight.device_title", lambda _: "another GPU")
        output_dir = f"{folder}/{rank}" if differs == "files" else folder
        config = small_config(output_dir=output_dir, cluster={"preflight": limits})
        rendezvous = join_rendezvous(rank_info(), seconds=60.0)
        patch.setattr("megatron_ext.launch.preflight._SHOWS_UP_SECONDS", 0.3)
        if differs in ("files", "links"):  # as if each rank were on a host of its own
            patch.setattr(type(rendezvous), "leaders", property(lambda self: list(self.members)))
        try:
            preflight = examine(rendezvous, config)
            with process_group(rendezvous.info, CPU, timeout_minutes=1.0, rendezvous=rendezvous) as processes:
                lines = preflight.measure(processes)
                processes.barrier()
                return lines
        except UserError as error:
            return [str(error)]


def test_fit_hosts_are_reported(tmp_path: Path) -> None:
    report = run_ranks(outcome, 2, str(tmp_path), "", {}, init=False)[0]
    assert "2 x CPU" in report[0]
    assert "matmul" in report[0]
    assert report[1].startswith("preflight passed in")
    assert "all-reduce" in report[1]
    assert not list((tmp_path / "run").iterdir()), "a probe is left"


@pytest.mark.parametrize(
    ("differs", "limits", "words"),
    [
        ("clock", {}, "is -1800.0 s off that of"),
        ("device", {}, "has another GPU for rank 1, while the others have CPU"),
        ("files", {}, "does not see what"),
        ("", {"min_free_gib": 1e9}, "less than cluster.preflight.min_free_gib 1e+09"),
        ("", {"min_bandwidth_gb_per_second": 1e9}, "less than cluster.preflight.min_bandwidth_gb_per_second 1e+09"),
        ("links", {"min_bandwidth_gb_per_second": 1e9}, "; the slowest link is that between"),
        ("", {"min_matmul_share": 1.0}, "multiplies matrices at"),
    ],
)
def test_an_unfit_host_is_named_on_every_rank(
    tmp_path: Path, differs: str, limits: dict[str, float], words: str
) -> None:
    messages = run_ranks(outcome, 3, str(tmp_path), differs, limits, init=False)
    assert messages[0] == messages[1] == messages[2]
    (message,) = messages[0]
    assert message.startswith("preflight: ")
    assert words in message


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        examine(join_rendezvous(rank_info(), seconds=10.0), small_config(output_dir=str(tmp_path / "file")))
