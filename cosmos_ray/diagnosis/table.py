"""Findings as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from cosmos_ray.diagnosis.checks import Finding


def as_text(found: Mapping[str, Sequence[Finding]]) -> str:
    """A line for each check of each node, and what to do."""
    lines = []
    for node, findings in found.items():
        lines.append(node)
        for finding in findings:
            lines.append(f"  {'ok  ' if finding.good else 'BAD '} {finding.check:<16} {finding.said}".rstrip())
            if finding.todo:
                lines.append(f"       {'':<16} -> {finding.todo}")
    bad = sum(not finding.good for findings in found.values() for finding in findings)
    checks = sum(map(len, found.values()))
    lines.append(f"{bad} of {checks} checks on {len(found)} {'node' if len(found) == 1 else 'nodes'} found something to do" if bad
                 else f"all {checks} checks on {len(found)} {'node' if len(found) == 1 else 'nodes'} are fine")
    return "\n".join(lines)


def as_json(found: Mapping[str, Sequence[Finding]]) -> str:
    return json.dumps({node: [asdict(finding) for finding in findings] for node, findings in found.items()}, indent=1) + "\n"
