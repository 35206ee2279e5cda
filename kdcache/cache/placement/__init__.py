"""Where the rows of an open cache are held: device, host, memory-mapped file, or streamed."""
