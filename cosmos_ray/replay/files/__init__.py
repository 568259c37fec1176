"""Files of a store: directories and object stores, durable writes, quarantine."""
