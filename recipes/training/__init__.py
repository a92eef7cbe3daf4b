"""Of any training: a run, its settings, its steps, its records."""
