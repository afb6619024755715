"""The decoder: its configuration, weights and layers."""
