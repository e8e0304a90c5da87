"""Tuning of the curriculum on short probes: the search, its probes, and the report."""
