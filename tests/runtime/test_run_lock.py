import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.run_lock import run_lock

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
