"""Experiments: runs of runs. What they are made of, how they are started, what they show."""
