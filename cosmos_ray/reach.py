"""Whether the other nodes of a Ray cluster reach what the run's processes there will need: its folder and its replay store."""

from __future__ import annotations

import contextlib
import logging
import secrets
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.replay.store import is_store
from cosmos_ray.supervision import Supervisor
from cosmos_ray.uri import is_uri

logger = logging.getLogger(__name__)

LOOK_S = 60.0  #: for a node to start a process and look


@ray.remote(num_cpus=0, max_retries=1)
def missing(marks: list[str], store: str) -> str:
    """What this node does not reach, in words; "" if it reaches all. ``marks`` are files in the folders, ``store`` is a store's URI."""
    gone = [mark for mark in marks if not Path(mark).exists()]
    if gone:
        return f"does not see {Path(gone[0]).parent}"
    try:
        if store:
            is_store(store)
    except StoreError as error:
        return f"cannot open the replay store ({error})"
    return ""


def check_nodes(folder: Path | None, store: Path | str, supervisor: Supervisor) -> None:
    """ConfigError, which names the nodes, when nodes of the cluster do not reach the run's ``folder`` or its ``store``.

    ``folder`` is None for a run in a bucket, of which every node has a working copy of its own. Asks nothing of a cluster of one node. A
    node that does not answer within :data:`LOOK_S` is named in a warning. With a store in a bucket, nodes without the folder may still
    collect, which takes the store alone: they are named in a warning too.
    """
    own = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own}
    if not others:
        return
    folders = [folder] if folder else []
    if not is_uri(store) and not (folder and Path(store).is_relative_to(folder)):
        folders.append(Path(store))
    marks = [place / f".reach-{secrets.token_hex(6)}" for place in folders if place.is_dir()]
    try:
        for mark in marks:
            replace(b"", mark)
        problems = _ask(others, [str(mark) for mark in marks], str(store) if is_uri(store) else "", supervisor)
    finally:
        for mark in marks:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
    lines = [f"node {address} {problem}" for address, problem in problems]
    blind = [line for line in lines if "does not see" in line]
    if is_uri(store) and blind:
        logger.warning("%s: rollout workers work there, inference actors and learner ranks do not", "; ".join(blind))
        lines = [line for line in lines if line not in blind]
    if lines:
        raise ConfigError(f"{'; '.join(lines)}: put --root and --replay.store on storage that all nodes mount at the same path, or into a "
                          "bucket (s3://, gs://) whose credentials all nodes have")


def _ask(nodes: dict[str, str], marks: list[str], store: str, supervisor: Supervisor) -> list[tuple[str, str]]:
    """(address, problem) of every node of ``nodes`` (id -> address) that reported one."""
    asked = {missing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(marks, store): address
             for node, address in nodes.items()}
    found, open_ = [], list(asked)
    for _ in range(int(LOOK_S)):
        ready, open_ = ray.wait(open_, num_returns=len(open_), timeout=1.0)
        for answer in ready:
            try:
                problem = ray.get(answer)
            except RayError as error:
                problem = ""
                logger.warning("node %s could not be asked whether it reaches the run: %s", asked[answer], str(error).splitlines()[0])
            found += [(asked[answer], problem)] if problem else []
        if not open_:
            break
        supervisor.waits("the run", f"node {asked[open_[0]]} to look for its folder and store")
    supervisor.goes_on("the run")
    for late in open_:
        logger.warning("node %s did not say within %.0f s whether it reaches the run", asked[late], LOOK_S)
    return found
