"""`oddsmith check`: whether what is installed can train, and what to do where it cannot."""
