"""Reads rows from sources and files."""
