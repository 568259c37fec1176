"""Best-of-N planning with the network's own world model and value function. Pure torch."""
