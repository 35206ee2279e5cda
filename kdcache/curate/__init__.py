"""Caches made from other caches and from files, and files made from caches: select, merge, convert."""
