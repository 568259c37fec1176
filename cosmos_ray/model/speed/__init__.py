"""Ways to run the same network faster: torch.compile and CUDA graphs."""
