"""Format version 1 on disk: schema, codec, Zarr arrays, integrity (docs/FORMAT.md)."""
