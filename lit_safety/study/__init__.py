"""Studies: many runs of our own commands that differ in a few settings, their figures in one file, one table, plots.

A study is a YAML file of rows. A row is what `python -m lit_safety` is to be called with; the runner calls it for every
seed, notes what came out in an append-only file, and skips what is noted already.
"""
