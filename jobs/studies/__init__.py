"""Studies of what the loop learns: arms and controls on held-out initial states, and the curves drawn from them."""
