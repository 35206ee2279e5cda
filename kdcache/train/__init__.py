"""Stage two: train students from a cache, and teachers from labels."""
