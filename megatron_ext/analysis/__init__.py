"""After a run: how unstable it was, what it reached at what cost, gradients by length; as tables, page, picture."""
