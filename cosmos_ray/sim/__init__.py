"""Simulation: robosuite tasks as fast, deterministic and restorable environments, and scripted demonstrations."""
