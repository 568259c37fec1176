"""The shared inference pool: batching core, Ray actor, and the two sides that talk to it."""
