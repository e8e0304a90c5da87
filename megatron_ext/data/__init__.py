"""From text to batches: tokenizers, token files, datasets, loaders. The only door to megatron.core.datasets."""
