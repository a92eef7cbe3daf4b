"""What all recipes share: a run, its settings, its steps, its records."""
