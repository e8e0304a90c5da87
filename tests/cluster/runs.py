"""Small runs over the hosts of the lab, started as a user starts them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.lab import Lab, LabProcess
from tests.train.small_run import VOCABULARY, corpus_data, train_records, write_config

# Long enough for any start on a busy machine; a limit on a fault is each test's own.
START_SECONDS = 240.0

# More than a run does before a signal reaches it; what it computes is compared over the first COMPARED ones.
STEPS = 400
COMPARED = 60

_OF_A_RUN = ("megatron_ext", "deepspeed", "pdsh")


def write_run(folder: Path, corpus: Path, **sections: Any) -> Path:
    """Config of a run of ``STEPS`` short steps without dropout, so that layouts give the same losses; its path."""
    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "kernels": "reference",
    }
    base: dict[str, Any] = {
        "model": model,
        "data": corpus_data(corpus),
        "training": {"seq_len": 32, "batch_size": 8, "duration": {"steps": STEPS}},
        "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 20}},
        "learning_rate": {"peak": 3e-4, "warmup": {"steps": 5}},
        "validation": {},
        "checkpoint": {},
        "metrics": {"flush_every": 1, "tensorboard": False, "log_every": 1},
    }
    folder.mkdir(exist_ok=True)
    return write_config(folder, **(base | sections))


def endless(**cluster: Any) -> dict[str, Any]:
    """Sections of a run that goes on until a fault ends it."""
    return {
        "training": {"seq_len": 16, "batch_size": 4, "duration": {"steps": 1_000_000}},
        "curriculum": {"pacing": "constant"},
        "metrics": {"flush_every": 1, "tensorboard": False, "log_every": 1000, "adam_variance_every": 0},
        "cluster": {"heartbeat_seconds": 5.0, **cluster},
    }


def write_hostfile(folder: Path, **slots: int) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_ext", *map(str, arguments)]


@contextmanager
def started(lab: Lab, *arguments: object, env: Mapping[str, str] | None = None) -> Iterator[LabProcess]:
    """Start the command line on the login node, its output in a file beside the config; killed at the end."""
    config = next(Path(str(argument)) for argument in arguments if str(argument).endswith(".json"))
    with (config.parent / "output").open("ab") as output:
        process = lab.start(command(*arguments), env=env, stdout=output.fileno(), stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.end()


def output_of(config: Path) -> str:
    return (config.parent / "output").read_text(errors="replace")


def errors_of(config: Path) -> list[str]:
    return [line for line in output_of(config).splitlines() if "error: " in line]


def wait_for_step(config: Path, step: int, process: LabProcess) -> None:
    run = config.parent / "small"

    def there() -> bool:
        assert process.process.poll() is None, f"ended before step {step}: {output_of(config)}"
        return any(record["step"] >= step for record in train_records(run))

    wait_until(there, START_SECONDS, lambda: output_of(config))


def wait_until(condition: Callable[[], bool], seconds: float, describe: Callable[[], str] = str) -> float:
    """Return the seconds until ``condition`` was true; AssertionError when it takes longer."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds:.0f} s: {describe()}"
        time.sleep(0.2)
    return time.monotonic() - start


def rank_pid(lab: Lab, host: str) -> int:
    lines = lab.processes(host, "-m megatron_ext.worker")
    (rank,) = (line for line in lines if "deepspeed" not in line)
    return int(rank.split()[1])


def nothing_left(lab: Lab, *hosts: str, seconds: float = 15.0) -> None:
    """Nothing of a run is alive, or a zombie, on any of the hosts (default: all) and the login node in some time."""
    left: dict[str, list[str]] = {}

    def none() -> bool:
        left.clear()
        for host in (*(hosts or lab.hosts), None):
            listed = lab.processes(host, word="")
            # A zombie has no command line any more.
            if found := [line for line in listed if line.startswith("Z") or any(part in line for part in _OF_A_RUN)]:
                left[host or "login"] = found
        return not left

    wait_until(none, seconds, lambda: json.dumps(left, indent=1))


def environment_of(lab: Lab, host: str | None, pid: int) -> dict[str, str]:
    """Environment with which a process of a host, or of the login node, was started."""
    text = lab.run(["cat", f"/proc/{pid}/environ"], host=host).stdout
    return dict(item.split("=", maxsplit=1) for item in text.split("\0") if "=" in item)


def losses(config: Path) -> list[float]:
    return [float(record["loss"]) for record in train_records(config.parent / "small")]
