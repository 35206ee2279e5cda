"""Stage one: run the teacher once and write its outputs into a cache."""
