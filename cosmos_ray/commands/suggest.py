"""What a user may have meant by a flag or command that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from cosmos_ray.commands.command import COMMANDS
from cosmos_ray.commands.tools import TOOLS
from cosmos_ray.config.meaning import meant
from cosmos_ray.config.settings import SETTINGS

#: Names that other programs give to what a command does.
COMMANDS_MEANT = {
    "train": "pretrain", "fit": "pretrain", "bc": "pretrain", "finetune": "refine", "tune": "refine", "rl": "refine", "eval": "evaluate",
    "test": "evaluate", "validate": "evaluate", "run": "demo", "start": "demo", "record": "collect", "demos": "collect",
    "gather": "collect",
    "sample": "rollout", "play": "rollout", "act": "rollout", "load": "import", "importweights": "import", "importcheckpoint": "import",
    "convert": "import", "download": "import", "save": "export", "exportweights": "export", "html": "report", "page": "report",
    "visualize": "plan", "imagine": "plan", "importdata": "replay import", "importdataset": "replay import", "ls": "replay ls",
    "show": "replay show", "stats": "replay stats", "verify": "replay verify", "list": "replay ls", "dataset": "replay", "buffer": "replay",
}  # fmt: skip


def flag_meant(bad: str, known: Iterable[str]) -> str:
    """What the unknown flag ``bad`` may stand for among the flags that a command has: "; did you mean ...?", or where to look."""
    flags = list(known)
    found = [SETTINGS[name].flag for name in meant(bad.lstrip("-"), {n: s for n, s in SETTINGS.items() if s.flag in flags})]
    settings = {setting.flag for setting in SETTINGS.values()}
    own = difflib.get_close_matches(bad, [flag for flag in flags if flag not in settings], n=1, cutoff=0.8)
    found = own or found or difflib.get_close_matches(bad, flags, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else "; see --help"


def command_meant(bad: str) -> str:
    """What the unknown command ``bad`` may stand for: "; did you mean ...?", or where to look."""
    word, commands = bad.lower(), [*COMMANDS, *TOOLS, "replay"]
    close = difflib.get_close_matches(word, commands, n=1, cutoff=0.75) or difflib.get_close_matches(word, commands, n=1, cutoff=0.5)
    found = COMMANDS_MEANT.get(word.replace("-", "").replace("_", "")) or next(iter(close), "")
    return f"; did you mean `{found}`?" if found else ": `cosmos_ray --help` lists them"
