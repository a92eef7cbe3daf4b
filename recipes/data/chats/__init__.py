"""From rows to conversations to text, with the spans that are scored."""
