"""Rollouts: the vLLM engine, its Ray actor, the worker that turns prompts into trajectories."""
