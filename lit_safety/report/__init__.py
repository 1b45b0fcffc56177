"""How results are shown: styles, charts and cards drawn from plain data."""
