"""`oddsmith prepare`: makes pairs of prompt, chosen and rejected answer from other data."""
