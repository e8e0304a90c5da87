"""Checkpoints: atomic publication, discovery, and everything that a bit-exact resume needs."""
