"""Make caches from other caches and files, and files from caches: select, merge, import, export."""
