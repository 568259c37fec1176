"""The address of a replay store that is no directory."""

from __future__ import annotations

import re
from pathlib import Path

SCHEMES = ("s3", "gs")


def is_uri(root: str | Path) -> bool:
    """Whether ``root`` names an object store (``s3://bucket/prefix``) rather than a directory."""
    return "://" in str(root)


def uri_problem(root: str | Path) -> str:
    """Why ``root`` cannot be the address of a store, in one line that shows no password; empty if nothing is wrong with it."""
    scheme, mark, rest = str(root).partition("://")
    if not mark:
        return ""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if re.fullmatch(r"[\w.-]+:\d+", authority) and "@" not in rest:
        return (f"the URI of the replay store has a server where the bucket's name belongs: write {scheme}://BUCKET/FOLDER"
                f"?endpoint_override={authority}")
    if "@" in authority or ":" in authority:
        return ("the URI of the replay store holds credentials: leave them out, and give them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS)")
    if scheme not in SCHEMES:
        return f"{root} is neither a folder nor an s3:// or gs:// URI"
    return "" if authority else f"{root} names no bucket: write {scheme}://BUCKET/FOLDER"
