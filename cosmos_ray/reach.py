"""Whether the other nodes of a Ray cluster reach what the run's processes there will need: its folder and its replay store."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.store import is_store
from cosmos_ray.supervision import Supervisor
from cosmos_ray.uri import is_uri

logger = logging.getLogger(__name__)

LOOK_S = 60.0  #: for a node to start a process and look


@ray.remote(num_cpus=0, max_retries=1)
def missing(lock: str, text: str, store: str) -> str:
    """What this node does not reach, in words; "" if it reaches all. ``lock`` is the run's lock, which holds ``text``, "" for a run in a
    bucket; ``store`` is a folder or a URI, "" for one in the run's folder."""
    try:
        if lock and Path(lock).read_text() != text:
            return f"sees another folder at {Path(lock).parent}"
    except OSError:
        return f"does not see {Path(lock).parent}"
    try:
        if store and not is_store(store) and not is_uri(store):  # a store in a bucket is made when the first episode comes
            return f"does not see the replay store {store}"
    except StoreError as error:
        return f"cannot open the replay store ({error})"
    return ""


class Reach:
    """Which nodes of the cluster reach the run's ``folder`` and its ``store``. Every node but the driver's own is asked once.

    ``folder`` is None for a run in a bucket, of which every node has a working copy of its own. With a store in a bucket, nodes without
    the folder may still collect, which takes the store alone: they are named in a warning, and used.
    """

    def __init__(self, folder: Path | None, store: Path | str, supervisor: Supervisor):
        lock = folder / ".lock" if folder else None
        inside = folder is not None and not is_uri(store) and Path(store).is_relative_to(folder)
        there = not inside and (is_uri(store) or is_store(store))  # a store that is not made yet cannot be looked for
        self._question = (str(lock or ""), lock.read_text() if lock else "", str(store) if there else "")
        self._folder_only_warns, self._supervisor = is_uri(store), supervisor
        self._known = {ray.get_runtime_context().get_node_id(): ""}  #: id of a node -> its problem
        self._asked: dict[str, ray.ObjectRef] = {}

    def check(self) -> None:
        """Ask every node of the cluster. ConfigError, which names the nodes, when some do not reach what the run needs. A node that does
        not answer within :data:`LOOK_S` is named in a warning."""
        until, nodes = time.monotonic() + LOOK_S, _alive()
        while late := [address for node, address in nodes.items() if self._problem(node, address) is None]:
            if time.monotonic() > until:
                logger.warning("node %s did not say within %.0f s whether it reaches the run", late[0], LOOK_S)
                break
            self._supervisor.waits("the run", f"node {late[0]} to look for its folder and store")
            time.sleep(0.1)
            nodes = _alive()
        self._supervisor.goes_on("the run")
        lines = [f"node {address} {self._known[node]}" for node, address in nodes.items() if self._known.get(node)]
        if lines:
            raise ConfigError(f"{'; '.join(lines)}: put --root and --replay.store on storage that all nodes mount at the same path, or "
                              "into a bucket (s3://, gs://) whose credentials all nodes have")

    def takes(self, node: str, address: str) -> bool:
        """Whether processes of the run may be placed on the node now. A node that has joined may once it has answered, without waiting
        here; one that does not reach the run is named once, and left alone."""
        before = node in self._known
        problem = self._problem(node, address)
        if problem and not before:
            logger.warning("node %s has joined and %s: the run does without it", address, problem)
        return problem == ""

    def _problem(self, node: str, address: str) -> str | None:
        """What the node does not reach; None while it has not answered."""
        if node not in self._known:
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            if node not in self._asked:
                self._asked[node] = missing.options(scheduling_strategy=where).remote(*self._question)
            answer = self._asked[node]
            if not ray.wait([answer], timeout=0)[0]:
                return None
            del self._asked[node]
            try:
                problem = ray.get(answer)
            except RayError:  # the node is gone again, or its process died: another look asks again
                return None
            if self._folder_only_warns and problem.endswith(str(Path(self._question[0]).parent)):
                logger.warning("node %s %s: rollout workers work there, inference actors and learner ranks do not", address, problem)
                problem = ""
            self._known[node] = problem
        return self._known[node]


def _alive() -> dict[str, str]:
    """id -> address of the cluster's nodes."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
