"""The art world's subjects and its judges."""
