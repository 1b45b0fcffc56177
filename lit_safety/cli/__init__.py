"""The command line: one file a command. Importing this package needs no torch."""
