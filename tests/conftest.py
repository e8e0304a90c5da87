"""Settings every test shares: the CPU accelerator unless the caller chose another, and one thread a process."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
