"""The ORPO head: from hidden states to log-probabilities and loss."""
