"""What keeps a store healthy: verification, repair and retention."""
