"""Simulation: robosuite tasks as fast, deterministic and restorable environments, with scripted demonstrations."""
