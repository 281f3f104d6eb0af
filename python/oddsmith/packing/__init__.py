"""Batches without padding: one packed row of tokens, and attention within its sequences."""
