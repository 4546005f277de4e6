"""Compressed KV caches inside stock vLLM: a plugin that neither forks nor patches it."""
