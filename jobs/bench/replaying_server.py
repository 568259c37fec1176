"""A model server of vla-eval that replays recorded actions; runs in vla-eval's own environment.

    python replaying_server.py ACTIONS.npz PORT EVENTS.jsonl

``ACTIONS.npz`` has an array (T, 7) ``TASK_STATE`` for every task number and initial state. Past the end of an array the server answers with
an action that moves nothing. Starts and ends of episodes go to ``EVENTS.jsonl``, with the time of this machine's monotonic clock.
"""

import json
import sys
import time

import numpy as np
from vla_eval.model_servers.base import ModelServer
from vla_eval.model_servers.serve import serve


class Replaying(ModelServer):
    def __init__(self, actions: str, events: str):
        self.actions, self.events = dict(np.load(actions)), open(events, "a", buffering=1)
        self.playing: dict[str, list] = {}  #: session -> [name of the episode, next step]

    def get_observation_params(self):
        return {"send_wrist_image": True, "send_state": True}

    def note(self, what, session, **more):
        self.events.write(json.dumps({"what": what, "session": session, "time": time.monotonic(), **more}) + "\n")

    async def on_episode_start(self, config, ctx):
        task = config["task"]
        self.playing[ctx.session_id] = [f"{task['task_id']}_{task['episode_idx']}", 0]
        self.note("start", ctx.session_id, episode=self.playing[ctx.session_id][0])

    async def on_observation(self, obs, ctx):
        playing = self.playing[ctx.session_id]
        recorded = self.actions[playing[0]]
        action = recorded[playing[1]] if playing[1] < len(recorded) else np.append(np.zeros(6), recorded[-1][6])
        playing[1] += 1
        await ctx.send_action({"actions": np.asarray(action, np.float32)})

    async def on_episode_end(self, result, ctx):
        self.note("end", ctx.session_id, episode=self.playing[ctx.session_id][0], steps=result["steps"],
                  success=bool(result["metrics"]["success"]))


if __name__ == "__main__":
    serve(Replaying(sys.argv[1], sys.argv[3]), host="127.0.0.1", port=int(sys.argv[2]))
