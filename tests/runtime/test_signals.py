import os
import signal
import subprocess
import sys

from megatron_ext.runtime.signals import stop_on_signal


def test_signal_becomes_a_request_and_the_old_handler_returns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


WORKER_LIKE = """
import os, signal, sys, time
from megatron_ext.runtime.signals import catch_stop_signals, ignore_stop_signals
stop = catch_stop_signals()
os.kill(os.getpid(), signal.SIGUSR1)  # while it loads
assert stop.signal_name == "SIGUSR1"
os.kill(os.getpid(), signal.SIGTERM)
ignore_stop_signals()

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGUSR1)  # while the interpreter shuts down
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(1, b"late")

kept = Late()
sys.modules["late"] = kept
"""


def test_a_signal_while_a_rank_loads_or_ends_does_not_kill_it() -> None:
    done = subprocess.run([sys.executable, "-c", WORKER_LIKE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "late", "")
