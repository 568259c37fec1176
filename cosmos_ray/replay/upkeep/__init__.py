"""What keeps a store healthy: verification and repair, retention, compaction."""
