"""``store.json``, which marks a directory as a replay store and holds its version and id."""

from __future__ import annotations

import json
import uuid

from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.storage import Storage

FILE = "store.json"
LAYOUT_VERSION = 2


class Marker:
    """The marker of the store in ``storage``, which is made if it is missing and ``create`` says so.

    StoreError if there is none, or one of another version, or one that cannot be read.
    """

    def __init__(self, storage: Storage, create: bool) -> None:
        self.storage = storage
        if create:
            with explained("create a replay store in", storage.name):
                if not storage.exists(FILE):
                    text = self._text(uuid.uuid4().hex)
                    storage.publish(FILE, lambda file: file.write(text))
        with explained("open", storage.where(FILE)):
            if not storage.exists(FILE):
                raise StoreError(f"{storage.name} is not a replay store (it has no {FILE}): check the path")
            version, self.id = self._read()
        if version > LAYOUT_VERSION:
            raise StoreError(f"{storage.name} is a store of version {version}, newer than {LAYOUT_VERSION}: upgrade")
        if version < LAYOUT_VERSION:
            raise StoreError(f"{storage.name} is a store of version {version}: this package reads version {LAYOUT_VERSION} only")

    def check_present(self) -> None:
        """StoreUnavailable unless this is still the store that was opened. A vanished mount leaves an empty directory, and the mount
        would hide files written there when it comes back."""
        if not self.storage.mountable:
            return
        try:
            same = self._read()[1] == self.id
        except FileNotFoundError:
            same = False
        if not same:
            raise StoreUnavailable(f"the replay store in {self.storage.name} has vanished ({FILE} is gone or another one): mount it again")

    def _text(self, name: str) -> bytes:
        return json.dumps({"format": "cosmos_ray replay store", "version": LAYOUT_VERSION, "id": name}).encode()

    def _read(self) -> tuple[int, str]:
        try:
            content = json.loads(self.storage.read(FILE))
            version, name = content["version"], content.get("id", "")
            if type(version) is not int or version < 1 or not isinstance(name, str):
                raise ValueError(f"version {version!r}, id {name!r}")
            return version, name
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(f"{self.storage.where(FILE)} does not describe a replay store: restore it or choose another root") from error
