"""DeepSpeed behind one small interface. The only door to deepspeed."""
