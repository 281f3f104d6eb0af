"""`make soak`: what takes hours, to find what tests of seconds cannot. docs/reliability.md has what was run."""
