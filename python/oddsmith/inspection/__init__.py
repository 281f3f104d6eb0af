"""Checks a preference dataset: figures in tokens, and likely mistakes."""
