import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.run_lock import is_locked, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_ext.runtime.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_job_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another job \(process {holder.pid} on"), run_lock(tmp_path):
            pytest.fail("two jobs hold the lock")
    finally:
        holder.kill()
        holder.communicate()
    with run_lock(tmp_path):
        pass


def test_a_holder_that_is_going_is_waited_for(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert is_locked(tmp_path)
    timer = threading.Timer(0.5, holder.kill)
    timer.start()
    with run_lock(tmp_path, wait_seconds=60):
        assert holder.wait() < 0
    timer.cancel()
    holder.communicate()
    assert not is_locked(tmp_path)
