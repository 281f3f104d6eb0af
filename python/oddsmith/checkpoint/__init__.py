"""Checkpoints on disk: quantised, and merged with an adapter, without a model in memory."""
