"""Programs that train models of the zoo."""
