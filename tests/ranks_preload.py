"""Imported once by the fork server of ``tests.ranks``: every rank starts as a fork of a process that holds all this."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import megatron.core.models.gpt.gpt_model  # noqa: F401
import torch

# DeepSpeed would compile an extension in init_distributed on a CPU; the tests never need it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
