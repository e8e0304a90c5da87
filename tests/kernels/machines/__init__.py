"""Tests of the machines that run kernels here: each fault of faulty.cu is reported as what it is."""
