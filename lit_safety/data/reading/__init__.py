"""How shards are read: which samples, in which order, decoded into batches."""
