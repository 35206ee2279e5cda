"""Stage one of language models: sequences of tokens in, rows of their teacher out."""
