"""From text to token ids, kept on disk."""
