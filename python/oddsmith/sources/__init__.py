"""Sources of rows: files, folders, saved datasets, the hub."""
