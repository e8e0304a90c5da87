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


def test_end_of_the_supervisor_is_a_request() -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with stop_on_signal(supervisor.pid) as stop:
            assert not stop.requested
            supervisor.kill()
            supervisor.wait()
            assert stop.requested
    finally:
        supervisor.kill()
        supervisor.communicate()
