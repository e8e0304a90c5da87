"""Measures of training instability: the loss ratio, and the variance in Adam's second moment."""
