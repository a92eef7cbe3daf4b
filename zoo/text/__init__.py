"""Tokenizers and chat templates: texts and conversations as ids. Needs no jax."""
