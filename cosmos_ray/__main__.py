"""``python -m cosmos_ray``."""

from cosmos_ray.commands.cli import entry

if __name__ == "__main__":
    entry()
