"""The commands that open no run: they look at machines and at what others do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from cosmos_ray.commands import doctor, size, study, why


@dataclass(frozen=True)
class Tool:
    """A command with flags of its own alone."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[str, int]]  #: what to print, and the exit code


TOOLS = {"study": Tool(study.HELP, study.add_flags, study.study_command), "size": Tool(size.HELP, size.add_flags, size.size_command),
         "doctor": Tool(doctor.HELP, doctor.add_flags, doctor.doctor),
         "why": Tool(why.HELP, why.add_flags, why.why)}
