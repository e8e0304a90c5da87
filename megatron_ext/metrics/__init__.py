"""What a run measures and where it goes: metrics.jsonl, TensorBoard, the terminal and the log."""
