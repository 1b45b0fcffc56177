"""Published sets and folders of images as shards."""
