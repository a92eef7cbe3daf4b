"""One run per file, every setting literal."""
