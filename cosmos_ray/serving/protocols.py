"""The three protocols, without a port: the public server's replies, openpi's observations, and a session with vla-eval."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosmos_ray import __version__
from cosmos_ray.deployment import INSTRUCTION
from cosmos_ray.serving.core import Answer, PolicyServer
from cosmos_ray.serving.wire import BadRequest

#: What the public server calls the predicted frame of each picture.
FUTURE_KEYS = {"wrist_image": "future_wrist_image", "left_wrist_image": "future_wrist_image", "right_wrist_image": "future_wrist_image2",
               "primary_image": "future_image", "secondary_image": "future_image2"}

#: What openpi's clients call what our observations hold.
OPENPI_KEYS = {"observation/image": "primary_image", "observation/wrist_image": "wrist_image", "observation/state": "proprio",
               "prompt": INSTRUCTION}

#: Observations of vla-eval hold these two views.
VLA_EVAL_CAMERAS = {"agentview": "primary_image", "wrist": "wrist_image"}


def aloha_reply(answer: Answer, everything: bool) -> dict[str, Any]:
    """The reply of the public HTTP server to one observation; ``everything``: with all candidates (``return_all_query_results``).

    Frames are predicted for the chosen candidate alone: the places of the others hold None, as the public server has it where nothing was
    predicted. Each candidate has one depth.
    """
    futures = {FUTURE_KEYS.get(key, f"future_{key}"): frames[0] for key, frames in answer.futures.items()} or None
    value, chosen = float(answer.values[0]), int(answer.chosen[0])
    reply: dict[str, Any] = {"actions": list(answer.actions[0]), "future_image_predictions": futures, "value_prediction": value}
    if everything:
        candidates = [list(chunk) for chunk in answer.candidates[0]]
        frames = [futures if i == chosen else None for i in range(len(candidates))]
        values = [float(score) for score in answer.scores[0]]
        reply |= {"all_actions": candidates, "all_future_image_predictions": frames, "all_value_predictions": values,
                  "all_actions_by_depth": [[chunk] for chunk in candidates],
                  "all_future_image_predictions_by_depth": [[frame] for frame in frames],
                  "all_value_predictions_by_depth": [[value] for value in values]}
    return reply


def openpi_observation(message: Any) -> dict[str, Any]:
    """The observation of a message of openpi's client, whose keys may be ours or openpi's. BadRequest."""
    if not isinstance(message, Mapping):
        raise BadRequest(f"a message is a dict with the observation, not a {type(message).__name__}")
    return {OPENPI_KEYS.get(key, key) if isinstance(key, str) else key: value for key, value in message.items()}


@dataclass
class VlaEvalSession:
    """One connection of vla-eval: asks the policy for a chunk, and hands it out an action at a time.

    ``execute``: actions of a chunk that are handed out; ``metadata``: what the answer to a hello holds besides vla-eval's own fields.
    """

    server: PolicyServer
    execute: int
    metadata: dict[str, Any] = field(default_factory=dict)
    _chunk: deque[np.ndarray] = field(default_factory=deque)

    async def reply(self, message: Any) -> dict[str, Any] | None:
        """What to send back; None where vla-eval expects nothing. BadRequest for what is no message."""
        if not isinstance(message, Mapping) or not {"type", "payload", "seq", "timestamp"} <= message.keys():
            raise BadRequest("a message of vla-eval has type, payload, seq and timestamp")
        kind, payload = message["type"], message["payload"]
        if not isinstance(payload, Mapping):
            raise BadRequest(f"the payload of a message is a dict, not a {type(payload).__name__}")
        if kind == "hello":
            return _message("hello", {"harness_version": f"cosmos_ray {__version__}", "protocol_version": 1, "capabilities": {},
                                      "model_server": "cosmos_ray", "observation_params": {"send_wrist_image": True, "send_state": True},
                                      **self.metadata}, message)
        if kind in ("episode_start", "episode_end"):
            self._chunk.clear()
            return None
        if kind != "observation":
            raise BadRequest(f"{str(kind)[:80]!r} is no type of message: send hello, episode_start, observation or episode_end")
        try:
            if not self._chunk:
                answer = await self.server.ask(vla_eval_observation(payload))
                self._chunk.extend(answer.actions[0][: self.execute])
            return _message("action", {"actions": self._chunk.popleft()}, message)
        except BadRequest as error:
            return _message("error", {"error": str(error), "message": str(error)}, message)


def vla_eval_observation(payload: Mapping[Any, Any]) -> dict[str, Any]:
    """Our observation of vla-eval's for LIBERO. BadRequest.

    Its ``states`` (8,) are the hand's position, its rotation as axis times angle, and two finger positions; ours (9,) are the finger
    positions, the hand's position and its quaternion (x, y, z, w).
    """
    images, states = payload.get("images"), payload.get("states")
    if not isinstance(images, Mapping) or states is None:
        raise BadRequest("an observation of vla-eval has images, states and task_description: ask for them with send_state", 422)
    states = np.asarray(states)
    if states.shape != (8,) or states.dtype.kind not in "fiu" or not np.isfinite(states).all():
        raise BadRequest(f"states are of shape {states.shape}, not 8 finite numbers: position, axis times angle, two fingers", 422)
    states = states.astype(np.float64)
    angle = float(np.linalg.norm(states[3:6]))
    axis = states[3:6] / angle if angle else np.zeros(3)
    quaternion = [*(np.sin(angle / 2) * axis), np.cos(angle / 2)]
    proprio = np.concatenate([states[6:], states[:3], quaternion]).astype(np.float32)
    views = {VLA_EVAL_CAMERAS.get(str(key), str(key)): image for key, image in images.items()}
    return {**views, "proprio": proprio, INSTRUCTION: payload.get("task_description")}


def _message(kind: str, payload: dict[str, Any], request: Mapping[Any, Any]) -> dict[str, Any]:
    return {"type": kind, "payload": payload, "seq": request["seq"], "timestamp": time.time()}
