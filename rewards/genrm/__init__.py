"""The generative reward model: judges, and the service that asks them. Importing the package imports nothing."""
