"""Text -> token ids, kept on disk."""
