"""Pipelines of steps that use each other's results, for recipes/pipeline.py."""
