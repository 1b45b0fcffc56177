"""The toy world's judge: a small network that knows the toy world's objects."""
