"""The address of a replay store, or of a folder of runs, that is no directory."""

from __future__ import annotations

import re
from pathlib import Path

SCHEMES = ("s3", "gs")


def is_uri(root: str | Path) -> bool:
    """Whether ``root`` names an object store (``s3://bucket/prefix``) rather than a directory."""
    return "://" in str(root)


def below(root: str, *parts: str) -> str:
    """``root``, a folder or a URI with its query, with ``parts`` added to its path."""
    address, mark, query = root.partition("?") if is_uri(root) else (root, "", "")
    return "/".join([address.rstrip("/"), *parts]) + mark + query


def uri_problem(root: str | Path) -> str:
    """Why ``root`` cannot be the address of a store, in one line that shows no password; empty if nothing is wrong with it."""
    scheme, mark, rest = str(root).partition("://")
    if not mark:
        return ""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if re.fullmatch(r"[\w.-]+:\d+", authority) and "@" not in rest:
        return (f"the URI has a server where the bucket's name belongs: write {scheme}://BUCKET/FOLDER"
                f"?endpoint_override={authority}")
    if "@" in authority or ":" in authority:
        return ("the URI holds credentials: leave them out, and give them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS)")
    if scheme not in SCHEMES:
        return f"{root} is neither a folder nor an s3:// or gs:// URI"
    return "" if authority else f"{root} names no bucket: write {scheme}://BUCKET/FOLDER"
