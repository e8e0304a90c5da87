"""Fused kernels: their build, the operators on them with gradients, and what each computes in plain PyTorch."""
