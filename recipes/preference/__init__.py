"""For pairs of answers: losses, the reference, the gates, and what is measured."""
