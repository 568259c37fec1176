"""Fault injection for the replay store: processes killed at random instants, files damaged in every way known."""
