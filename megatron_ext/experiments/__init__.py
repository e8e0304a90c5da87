"""Runs of runs: comparisons from one JSON file, and the search for a curriculum on short probes."""
