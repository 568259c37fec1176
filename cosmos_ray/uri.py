"""The address of a store that is no directory, and what of it may be shown."""

from __future__ import annotations

import re
from pathlib import Path


def is_uri(root: str | Path) -> bool:
    """Whether ``root`` names an object store (``s3://bucket/prefix``) rather than a directory."""
    return "://" in str(root)


def without_credentials(text: str) -> str:
    """``text`` without the user name and password of a URI; anything else as it is.

    A password with characters that should have been escaped makes it ambiguous where the address begins: then too much is
    left out rather than too little.
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    end = re.search(r"[/?#]|$", rest).start()
    authority = rest[:end]
    if "@" in authority:
        return scheme + mark + authority.rpartition("@")[2] + rest[end:]
    return scheme + mark + (rest.rpartition("@")[2] if ":" in authority else rest)
