"""Before a run trains: do all ranks run the same thing, and are their hosts fit for it."""
