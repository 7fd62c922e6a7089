"""Head and fused folders: save, load, fuse, adopt."""
