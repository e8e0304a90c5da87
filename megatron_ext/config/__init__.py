"""The run config: schema, checks, loading. Imports no torch."""
