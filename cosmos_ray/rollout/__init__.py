"""Rollout workers: episodes from the simulator into the replay store."""
