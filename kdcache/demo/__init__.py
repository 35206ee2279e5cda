"""`kdcache demo`: both stages on data that need no download, images of digits or texts of Python's documentation."""
