"""Adapters: from a PEFT folder to a slot."""
