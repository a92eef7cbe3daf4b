"""Arrays on disk: Hugging Face folders and the state of a run, whatever they are for."""
