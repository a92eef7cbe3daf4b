"""Sources and files -> rows."""
