"""Tools that a rollout may call: what they are, where they run, how a call ends."""
