"""Data sets, samples, seeded views, transforms, and how they are matched with a cache."""
