"""What ORPOTrainer is put together from: hooks, metrics, models, optimisers by name."""
