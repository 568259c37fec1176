"""cosmos_ray: a closed-loop Ray actor-learner system for Cosmos Policy (arXiv 2601.16163)."""

__version__ = "0.1.0"
