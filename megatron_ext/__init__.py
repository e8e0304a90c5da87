"""Pretraining of GPT-2/GPT-3 models with Sequence Length Warmup, on DeepSpeed and megatron-core."""

__version__ = "0.1.0"
