"""The layout over ranks: groups, random streams, and operations on a split vocabulary."""
