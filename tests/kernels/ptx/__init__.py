"""An interpreter of PTX: what nvcc made of the kernels, run on the CPU with every access checked.

Names of opcodes and what they do: NVIDIA's "PTX ISA". Not interpreted: local memory, calls, tensor cores, asynchronous
copies, clusters; an opcode that is not known is an error. What ptxas makes of the PTX is not looked at.
"""
