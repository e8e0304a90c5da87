"""A trace of chosen steps by torch.profiler, for chrome://tracing or Perfetto."""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_ext.runtime.device import Device
from megatron_ext.runtime.log import LOGGER


class StepProfiler:
    """Records the steps [first, first + count) of a run into one file; does nothing at other steps."""

    def __init__(self, file: Path, device: Device, *, first: int, count: int) -> None:
        """Write to ``file`` (Chrome's trace format, compressed where it ends in .gz); its directory is made."""
        self._file = file
        self._first, self._end = first, first + count
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_gpu else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running = False

    def before(self, step: int) -> None:
        """Called before every step (0-based); starts the trace, or ends it."""
        if step == self._first and not self._running:
            self._profile.start()
            self._running = True
        if step >= self._end:
            self.close()

    def close(self) -> None:
        """End the trace and write it, where one is running."""
        if not self._running:
            return
        self._running = False
        self._profile.stop()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._file))
        except OSError as error:
            LOGGER.warning("trace %s cannot be written (%s); the run goes on without it", self._file, error)
            return
        LOGGER.info("trace of steps %d to %d: %s", self._first + 1, self._end, self._file)
