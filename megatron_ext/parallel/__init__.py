"""What ranks share: groups, the object DeepSpeed asks about them, random streams, recomputation, vocabulary."""
