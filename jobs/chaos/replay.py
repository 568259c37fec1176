"""Chaos for the replay store: writers and readers killed at random instants, and files damaged in every way known.

    python jobs/chaos/replay.py --kills 500 --corruptions 200 --seed 0
    python jobs/chaos/replay.py --only flip_jpeg --seed 17        # repeat one corruption of an earlier run
    python jobs/chaos/replay.py --list                            # the faults

Prints a tally; the exit status is 1 if anything was lost, doubled, torn, wrong, or crashed, or if a damaged file was not named.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import cv2  # noqa: E402

from jobs.chaos.case import FAULTS  # noqa: E402
from jobs.chaos.corruptions import CorruptionRun, CorruptionTally, scratch_directory  # noqa: E402
from jobs.chaos.kills import KillRun, KillTally  # noqa: E402


def print_kills(tally: KillTally) -> None:
    kills = ", ".join(f"{count} of {role}" for role, count in sorted(tally.kills.items()))
    print(f"\nKILLS  {sum(tally.kills.values())} by SIGKILL ({kills}) in {tally.seconds:.0f} s")
    print(f"  processes started             {sum(tally.starts.values())}")
    print(f"  commits acknowledged          {tally.commits}, of {tally.acknowledged} episodes")
    print(f"  killed before the reply       {tally.reply_lost}")
    print(f"  evicted on purpose            {tally.evicted}")
    print(f"  maintenance                   {', '.join(f'{name} {n}' for name, n in sorted(tally.operations.items())) or 'none'}")
    print(f"  stray temporaries quarantined {tally.stray_temporaries}")
    for name, count in tally.violations.items():
        print(f"  {name:<29} {count}{'' if not count else '   <- must be 0'}")
    for detail in tally.details[:20]:
        print("    " + detail.replace("\n", "\n      "))


def print_corruptions(tally: CorruptionTally) -> None:
    print(f"\nCORRUPTIONS  {tally.cases} of {tally.faults} faults in {tally.seconds:.0f} s")
    print(f"  named by file                 {tally.named}")
    print(f"  harmless, content identical   {tally.harmless}")
    print(f"  violations                    {len(tally.failures)}{'' if not tally.failures else '   <- must be 0'}")
    for failure in tally.failures:
        print(f"    --only {failure.fault} --seed {failure.seed}  ({failure.file})")
        for problem in failure.problems:
            print("      " + problem.replace("\n", "\n        "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=None, help="of writers and readers together (500; 0 with --only)")
    parser.add_argument("--corruptions", type=int, default=None, help="(200; 1 with --only)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(FAULTS), metavar="FAULT", help="corruptions by this fault alone")
    parser.add_argument("--directory", help="where to make the stores (a temporary directory; in memory for the corruptions)")
    parser.add_argument("--json", help="file for the tally")
    parser.add_argument("--list", action="store_true", help="print the faults")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:<28} {(fault.__doc__ or '').splitlines()[0]}" for name, fault in sorted(FAULTS.items())))
        return 0
    kills = arguments.kills if arguments.kills is not None else 0 if arguments.only else 500
    corruptions = arguments.corruptions if arguments.corruptions is not None else 1 if arguments.only else 200
    logging.getLogger().addHandler(logging.NullHandler())  # the store's warnings are counted, not shown
    cv2.setNumThreads(1)  # children are forked: the parent must have no threads
    result, violations = {"seed": arguments.seed}, 0
    if kills:
        with tempfile.TemporaryDirectory(prefix="chaos-replay-", dir=arguments.directory) as work:
            killed = KillRun(Path(work) / "killed", arguments.seed).run(kills)
        print_kills(killed)
        result["kills"], violations = killed.as_dict(), sum(killed.violations.values())
    if corruptions:
        with tempfile.TemporaryDirectory(prefix="chaos-replay-", dir=arguments.directory or scratch_directory()) as work:
            damaged = CorruptionRun(Path(work) / "damaged", arguments.seed, arguments.only).run(corruptions)
        print_corruptions(damaged)
        result["corruptions"], violations = damaged.as_dict(), violations + len(damaged.failures)
    result["violations"] = violations
    print(f"\n{'FAILED: ' + str(violations) + ' violations' if violations else 'passed: no violation'}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
