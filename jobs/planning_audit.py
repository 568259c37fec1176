"""Ray job entry point: what planning could win for a checkpoint of a run, and which learned part limits it.

    ray job submit --working-dir . -- python jobs/planning_audit.py --root /shared/runs --name NAME --checkpoint base
"""

import os
import sys

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

from cosmos_ray.commands.cli import entry  # noqa: E402

if __name__ == "__main__":
    entry(["audit", *sys.argv[1:]])
