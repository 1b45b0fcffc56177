"""What a shard is: samples, tar index, manifest, writer."""
