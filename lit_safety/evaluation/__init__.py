"""Evaluation: draw the same prompts and seeds with every arm, let a judge look, count, and show.

The way of a run: `prompts` (what is asked) -> `drawing` (pictures kept on disk) -> `judging` (a verdict or an error
for each picture) -> `metrics` (shares with intervals) -> `report` (metrics.json, table, before_after.png, index.html).
`evaluate` is the command that does all of it; `compare` puts finished reports side by side.
"""
