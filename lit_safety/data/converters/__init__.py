"""Published and private preference data into shards: one module a layout, `run` does what they share."""
