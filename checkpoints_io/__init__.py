"""Arrays on disk: Hugging Face folders and the state of a run. Knows nothing of what they are for."""
