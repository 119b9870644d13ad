"""Training: one loop for every family, its checkpoints, and the edge to Ray Train."""
