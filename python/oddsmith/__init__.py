"""oddsmith."""
