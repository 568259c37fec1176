"""The limit of planning: the true simulator replaces the world model, and the true return replaces the value function."""
