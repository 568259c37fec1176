"""Ray job entry point: `ray job submit --working-dir . -- python jobs/collect.py --root /shared/runs --name NAME ...`."""

import os
import sys

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

from cosmos_ray.commands.cli import entry  # noqa: E402

if __name__ == "__main__":
    entry(["collect", *sys.argv[1:]])
