"""What architectures share."""
