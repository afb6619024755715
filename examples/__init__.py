"""A small model, three adapters trained on it, and prompts to try them with."""
