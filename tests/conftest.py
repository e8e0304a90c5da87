"""Settings every test shares: the CPU accelerator unless the caller chose another, one thread, no deadlines."""

import os

from hypothesis import settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline for an example is a timed test: it fails where the machine is busy.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
