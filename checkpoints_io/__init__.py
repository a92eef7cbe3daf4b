"""Arrays on disk: Hugging Face model folders and training-run state, for any kind of model."""
