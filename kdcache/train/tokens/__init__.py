"""Stage two for language models: train students from the rows of a teacher at the positions of sequences."""
