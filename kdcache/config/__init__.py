"""Pipeline files: their schema, and how they are read."""
