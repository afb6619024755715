"""Webhooks: the signed requests that tell of the ends of submissions, and the notifier."""
