"""Adapters from the Hugging Face hub: the cache, the downloads, and the fetcher."""
