"""The architecture rules: a table, the rules of one module, the rules of the import graph."""
