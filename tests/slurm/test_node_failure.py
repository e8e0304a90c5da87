"""A node is gone while a job runs on it."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab import Lab, LabOptions, why_not
from tests.slurm.conftest import LONG, Cluster, small_config
from tests.train.small_run import train_records

pytestmark = pytest.mark.cluster


def test_the_run_goes_on_on_the_other_nodes(corpus: Path, tmp_path: Path, straight: list[dict[str, Any]]) -> None:
    """As on clusters with the usual settings, the ranks notice before SLURM does, which asks nodes less often."""
    if reason := why_not(slurm=True):
        pytest.skip(reason)
    with Lab(LabOptions(hosts=3, slurm=True, slurm_lines="SlurmdTimeout=20")) as lab:
        cluster, run = Cluster(lab), tmp_path / "small"
        cluster.submit(small_config(tmp_path, corpus, cluster={"heartbeat_seconds": 5.0}, **LONG))
        cluster.wait_for_step(run, 3)
        lab.power_off("n2")
        cluster.wait_for_end(run, events=("requeued", "ended"))
        cluster.wait_for_restart(run)
        cluster.wait_for_end(run)
        assert train_records(run) == straight
        told = cluster.status(run)
        assert (told["state"], told["nodes"]) == ("finished", "n[1,3]")
