"""Padding-free batches: one packed row of real tokens, and attention within its sequences."""
