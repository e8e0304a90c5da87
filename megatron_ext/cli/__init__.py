"""The command line: one module per command. Importing these modules imports no torch; their functions may."""
