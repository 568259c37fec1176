"""A policy behind a port: the public HTTP server's requests, and the websocket protocols of openpi and of vla-eval."""
