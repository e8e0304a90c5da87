"""Kernels on every machine that can run them: emulated and interpreted GPUs, the CPU, and a GPU where there is one."""
