"""HTML pages about a run and its data."""
