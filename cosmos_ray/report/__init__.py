"""The report of a run: a self-contained HTML page, the same numbers as JSON, and pictures of episodes."""
