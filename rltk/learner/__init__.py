"""The learner: DeepSpeed ranks that turn scored trajectories into new weights."""
