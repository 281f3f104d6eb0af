"""Where rows come from: files, folders, saved datasets, the hub."""
