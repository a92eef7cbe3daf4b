"""Steps that follow from each other: recipes/pipeline.py."""
