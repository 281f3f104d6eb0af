"""What a preference dataset is like in tokens, and what is wrong with it."""
