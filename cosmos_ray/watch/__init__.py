"""The live page of a run or a store: what happens now, every episode, the value function, two arms side by side.

The room only reads files, takes no lock and asks nothing of the run's processes. It imports neither torch nor Ray.
"""
