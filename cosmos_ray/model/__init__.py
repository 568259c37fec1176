"""The network as policy, world model and value function. Pure torch: no Ray, no simulator, no store."""
