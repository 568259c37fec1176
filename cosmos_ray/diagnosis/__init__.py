"""What is wrong with the machines of a cluster, and what a run that seems to stand still waits for."""
