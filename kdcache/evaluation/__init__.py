"""Measure trained networks, and write the report about them."""
