"""`oddsmith prepare`: pairs of prompt, chosen and rejected answer out of other people's data."""
