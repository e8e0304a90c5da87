"""The emulated GPU: csrc/emulator, and the kernels of csrc/cuda compiled for it by g++."""
