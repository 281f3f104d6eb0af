"""From rows of a preference dataset to batches of token ids."""
