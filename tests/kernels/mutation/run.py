"""Plants each fault in turn and asks the tests of one machine after another until one notices."""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.building import ROOT, SOURCES
from tests.kernels.mutation.faults import FAULTS, Fault

CUDA_MACHINES = ("emulator-forward", "emulator-reverse", "emulator-random", "ptx-90")
CPU_MACHINES = ("cpu-serial", "cpu-threads")
AT_ONCE = 2
NO_TESTS = 5

_NOTICED = re.compile(r"^E\s+(.*)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """Which machine noticed a fault, and how; ``machine`` is None where none did."""

    fault: Fault
    machine: str | None
    how: str
    seconds: float


def try_fault(fault: Fault, root: Path = SOURCES) -> Outcome:
    """Runs the tests of the fault's ops on sources that have it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        planted = Path(folder) / "csrc"
        fault.plant(root, planted)
        for machine in CPU_MACHINES if fault.on_cpu else CUDA_MACHINES:
            how = _noticed(fault, machine, planted)
            if how is not None:
                return Outcome(fault, machine, how, time.monotonic() - start)
    return Outcome(fault, None, "", time.monotonic() - start)


def _noticed(fault: Fault, machine: str, planted: Path) -> str | None:
    """How the tests on one machine fail; None where they pass."""
    files = [str(ROOT / f"tests/kernels/test_{op}.py") for op in fault.ops]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    environment = {**os.environ, "KERNEL_TEST_SOURCES": str(planted), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-k", machine, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the process died of signal {-done.returncode}"
    found = _NOTICED.search(done.stdout)
    if done.returncode == NO_TESTS or found is None or "error:" in found[1] or "has no attribute" in found[1]:
        raise RuntimeError(f"{fault.name}: the tests cannot be run\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return found[1]


def short(how: str) -> str:
    """The end of a message that begins with names of kernels."""
    return re.sub(r"^.*?KernelError: ", "", how).split(" [")[0][-100:]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(chosen: str = "") -> int:
    """Tries all faults whose name or file contains ``chosen``; 1 if one survives or is not in the sources once."""
    faults = [fault for fault in FAULTS if chosen in f"{fault.file} {fault.name}"]
    stale = [fault for fault in faults if fault.occurrences(SOURCES) != 1]
    for fault in stale:
        _say(f"error: {fault.name}: its text is in {fault.file} {fault.occurrences(SOURCES)} times")
    if stale:
        return 1
    survivors = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(try_fault, faults):
            what = f"{outcome.fault.file.split('/', 1)[1]}: {outcome.fault.name}"
            by = f"{outcome.machine}: {short(outcome.how)}" if outcome.machine else "SURVIVES"
            _say(f"{what:72} | {outcome.seconds:4.0f} s | {by}")
            survivors += outcome.machine is None
    _say(f"{len(faults)} faults planted, {survivors} not noticed")
    return 1 if survivors else 0
