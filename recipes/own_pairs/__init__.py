"""Makes pairs of one's own: prompts, answers of a model, scores of a judge, then pairs."""
