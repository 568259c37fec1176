"""The command line: flags, TOML files, and what each command prints."""
