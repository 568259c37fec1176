"""`ray job submit` from this checkout, with the same arguments: `python jobs/submit.py -- python jobs/refine.py --name NAME --root ROOT`.

Refuses a working directory that Ray could not take, with what to leave out, and gives the job two minutes to save its work when
`ray job stop` ends it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path

from ray._private.runtime_env import packaging

ROOT = Path(__file__).parents[1]
STOP_S = 120  #: that a stopped job has before Ray kills it; Ray's own default is 3
LARGEST = 5  #: files and folders to name


def sizes(folder: Path) -> Counter[str]:
    """Bytes that Ray would take along, by file or folder at most two levels below ``folder``, after .gitignore and .rayignore."""
    taken: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            taken["/".join(path.relative_to(folder).parts[:2])] += path.stat().st_size

    packaging._dir_travel(folder, [], add, include_gitignore=True, logger=logging.getLogger(__name__))
    return taken


def refusal(folder: Path, limit: int) -> str:
    """Why the job cannot have ``folder`` as its working directory of at most ``limit`` bytes, in one line; empty when it can."""
    taken = sizes(folder)
    total = sum(taken.values())
    if total < limit:
        return ""
    largest = [f"/{name} ({size / 2**20:.0f} MB)" for name, size in taken.most_common(LARGEST) if size > total / 100]
    return (f"the working directory {folder} has {total / 2**20:.0f} MB, and Ray takes less than {limit / 2**20:.0f} MB: add these to "
            f"{folder / '.rayignore'}, and keep data below --root: {', '.join(largest)}")


def main(arguments: list[str]) -> int:
    """Check, then become `ray job submit`. Returns 2 for a refusal."""
    if "--" not in arguments or "--working-dir" in arguments or any(word.startswith("--runtime-env") for word in arguments):
        sys.stderr.write("submit: usage: python jobs/submit.py [options of `ray job submit` but --working-dir and --runtime-env] -- "
                         "python jobs/STAGE.py --name NAME --root ROOT\n")
        return 2
    if said := refusal(ROOT, packaging.GCS_STORAGE_MAX_SIZE):
        sys.stderr.write(f"submit: {said}\n")
        return 2
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}})
    os.execv(sys.executable, [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(ROOT),
                              "--runtime-env-json", environment, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
