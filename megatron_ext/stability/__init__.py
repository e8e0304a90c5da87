"""Measures of training instability: the loss ratio (and later the variance of Adam's second moment)."""
