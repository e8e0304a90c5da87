"""An emulated GPU, and the kernels of csrc/cuda compiled for it by g++."""
