"""Quantises checkpoints on disk and merges adapters into them, without a model in memory."""
