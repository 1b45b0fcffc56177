"""Studies: many runs of our own commands that differ in a few settings, their figures, a table, plots."""
