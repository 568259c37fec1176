"""Where bytes lie: directories and object stores, durable writes, quarantine."""
