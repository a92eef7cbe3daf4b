"""Rows -> conversations -> text, with the stretches that are scored."""
