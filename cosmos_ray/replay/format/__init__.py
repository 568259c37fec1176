"""One episode: its record, its Arrow schema, its bytes on disk."""
