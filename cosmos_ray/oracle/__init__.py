"""What planning could win: the true simulator as world model and the true return as value function, in place of the learned ones."""
