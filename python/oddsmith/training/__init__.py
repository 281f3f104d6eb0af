"""The parts of ORPOTrainer: hooks, metrics, models, optimisers by name."""
