"""The policy server: real clients over real sockets, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import json_numpy
import msgpack
import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from vla_eval.connection import Connection
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from cosmos_ray import load_policy
from cosmos_ray.commands.cli import main
from cosmos_ray.config import InferenceConfig, RunConfig
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.port import bound
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.serving.core import PolicyServer
from cosmos_ray.serving.wire import BadRequest
from tests import test_command_line, test_deployment
from tests.conftest import ROOT, environment
from tests.test_planning import demo_policy

handlers, observed = test_command_line.handlers, test_deployment.observed
LIFT, PLANNER = test_deployment.LIFT, test_deployment.PLANNER
TOKEN = "a secret of sixteen letters"


class Serving:
    """A server process on a free port."""

    def __init__(self, folder, *flags: str, **variables: str):
        command = [sys.executable, "-m", "cosmos_ray", "serve", "--root", str(folder.parent), "--name", folder.name, "--port", "0", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**environment(), **variables}, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True)
        said = []
        while True:
            line = self.process.stdout.readline()
            said.append(line)
            if found := re.search(r"on http://([^/]+)/act", line):
                break
            assert line, "".join(said)
        self.address = found[1]
        self.http = httpx.Client(base_url=f"http://{self.address}", timeout=120)

    def act(self, body, **headers):
        return self.http.post("/act", content=body if isinstance(body, (bytes, str)) else json_numpy.dumps(body), headers=headers)

    def end(self) -> str:
        self.http.close()
        self.process.send_signal(signal.SIGINT)
        text = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, text
        return text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a refined policy."""
    config = RunConfig(root=str(tmp_path_factory.mktemp("runs")), name="small", planner=PLANNER, inference=InferenceConfig(steps=3))
    folder = RunFolder(config)
    save_policy(demo_policy(), folder.checkpoint("refined"), 1)
    folder.close()
    return folder.path


@pytest.fixture(scope="module")
def serving(run):
    started = Serving(run, "--record")
    yield started
    assert "answered" in started.end()


@pytest.fixture(scope="module")
def policy(run):
    return load_policy(run / "checkpoints" / "refined")


# ---------------------------------------------------------------- the public HTTP server's requests


def test_replies_are_those_of_the_public_server(serving, policy):
    reply = serving.act(observed())
    assert reply.status_code == 200
    got, mine = json_numpy.loads(reply.text), policy.get_action(observed(), futures=True)
    assert np.array_equal(np.stack(got["actions"]), mine.actions) and got["value_prediction"] == pytest.approx(mine.value)
    assert got.keys() == {"actions", "future_image_predictions", "value_prediction"}
    futures = got["future_image_predictions"]
    assert futures.keys() == {"future_wrist_image", "future_image"}
    assert np.array_equal(futures["future_wrist_image"], mine.futures["wrist_image"]) and futures["future_image"].dtype == np.uint8


def test_double_encoded_requests_get_double_encoded_replies(serving, policy):
    reply = serving.act(json.dumps({"encoded": json_numpy.dumps(observed())}))
    assert np.array_equal(np.stack(json_numpy.loads(reply.json())["actions"]), policy.get_action(observed()).actions)


def test_plain_lists_are_answered_with_plain_lists(serving, policy):
    plain = {key: value if isinstance(value, str) else value.tolist() for key, value in observed().items()}
    got = serving.act(json.dumps({**plain, "futures": False})).json()
    assert np.allclose(np.array(got["actions"]), policy.get_action(observed()).actions) and got["future_image_predictions"] is None


def test_all_query_results_has_every_candidate(run):
    serving = Serving(run, "--plan", "--checkpoint", "refined")
    try:
        got = json_numpy.loads(serving.act(observed(return_all_query_results=True)).text)
        info = serving.http.get("/info").json()
    finally:
        serving.end()
    mine = load_policy(run / "checkpoints" / "refined", candidates=3)
    assert np.array_equal(np.stack(got["actions"]), mine.get_action(observed()).actions)
    assert np.stack([np.stack(chunk) for chunk in got["all_actions"]]).shape == (3, 8, 4) == (info["candidates"], info["chunk"], 4)
    assert max(got["all_value_predictions"]) == got["value_prediction"]
    assert [frames is None for frames in got["all_future_image_predictions"]].count(False) == 1
    assert {len(got[f"all_{what}_by_depth"]) for what in ("actions", "future_image_predictions", "value_predictions")} == {3}


def test_health_and_info(serving):
    assert serving.http.get("/health").json() == {"status": "ok"}
    info = serving.http.get("/info").json()
    assert info["checkpoint"] == "refined" and info["policy_version"] == 1 and info["proprio_dim"] == 9
    assert serving.http.get("/elsewhere").status_code == 404 and serving.http.get("/act").status_code == 405


def test_a_seed_of_the_request_is_its_noise(serving, policy):
    got = json_numpy.loads(serving.act(observed(seed=7)).text)
    assert np.array_equal(np.stack(got["actions"]), policy.get_action(observed(), seed=7).actions)




def lying(data="", dtype="<f4", shape=(1,)) -> dict:
    """An observation whose proprioception is an array that cannot be."""
    return {"proprio": {"__numpy__": data, "dtype": dtype, "shape": list(shape)}}


BAD = {
    "no JSON": (b"{", 400),
    "not UTF-8": (b"\xff\xfe", 400),
    "deep": (b"[" * 100_000, 400),
    "a list": ("[]", 422),
    "nothing": ({}, 422),
    "an unknown key": (observed(side_image=np.zeros((4, 4, 3), np.uint8)), 422),
    "no camera": (observed(wrist_image=None), 422),
    "floats as a picture": (observed(wrist_image=np.zeros((8, 8, 3))), 422),
    "a flat picture": (observed(wrist_image=np.zeros((8, 8), np.uint8)), 422),
    "too few numbers": (observed(proprio=np.zeros(3)), 422),
    "not finite": (observed(proprio=np.full(9, np.nan)), 422),
    "a batch": (observed(2), 422),
    "no instruction": (observed(task_description=None), 422),
    "a long text": (observed(task_description="a" * 5000), 422),
    "unlike lists": ('{"proprio": [[1], [1, 2]]}', 422),
    "objects": (lying("AAAA", "O"), 400),
    "a pickle": (lying("gASVCg==", "|O8"), 400),
    "a record": (lying("", "i4,f4", (0,)), 400),
    "bytes that do not fit": (lying("AAAA", shape=(9,)), 400),
    "a shape below 0": (lying(shape=(-1,)), 400),
    "a huge shape": (lying("AAAA", shape=(2**31 - 1, 2**31 - 1)), 400),
    "no base64": (lying("?"), 400),
    "a seed of text": (observed(seed="x"), 422),
    "a huge seed": (observed(seed=2**80), 422),
    "executed alone": (observed(executed=3), 422),
    "encoded twice": ('{"encoded": 3}', 400),
    "an episode without a name": (observed(episode="../x"), 422),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_gets_a_status_and_one_sentence(serving, what):
    body, status = BAD[what]
    reply = serving.act(body if isinstance(body, (bytes, str)) else json_numpy.dumps(body))
    assert reply.status_code == status and reply.json().keys() == {"error"} and "\n" not in reply.json()["error"], reply.text


def test_a_body_beyond_the_limit_is_refused(serving):
    assert serving.act(b" " * (64 * 2**20 + 1)).status_code == 413


def test_many_clients_at_once_get_their_own_answers(serving, policy):
    with ThreadPoolExecutor(16) as clients:
        replies = list(clients.map(lambda i: serving.act(observed(seed=i, futures=False)), range(48)))
    for i in (0, 17, 47):
        got = json_numpy.loads(replies[i].text)
        assert np.allclose(np.stack(got["actions"]), policy.get_action(observed(), seed=i).actions, atol=1e-5)
    assert {reply.status_code for reply in replies} == {200}


# ---------------------------------------------------------------- a full queue, tokens, ports


def test_a_full_queue_answers_429(policy):
    async def crowd() -> list:
        server = PolicyServer(policy, max_batch=1, wait_ms=0, queue=2)
        return await asyncio.gather(*(server.ask(observed()) for _ in range(5)), return_exceptions=True)

    answers = asyncio.run(crowd())
    refused = [answer for answer in answers if isinstance(answer, BadRequest)]
    assert len(refused) == 3 and {error.status for error in refused} == {429}
    assert all(answer.actions.shape == (1, 8, 4) for answer in answers if not isinstance(answer, BadRequest))


def test_queries_with_pictures_of_other_sizes_share_a_server(policy):
    async def both() -> list:
        server = PolicyServer(policy, max_batch=8, wait_ms=50, queue=8)
        return await asyncio.gather(server.ask(observed(size=64)), server.ask(observed(size=48)), server.ask(observed(3)))

    small, large, three = asyncio.run(both())
    assert small.actions.shape == large.actions.shape == (1, 8, 4) and three.actions.shape == (3, 8, 4)


def test_a_server_for_other_machines_asks_for_its_token(run):
    serving = Serving(run, "--host", "0.0.0.0", COSMOS_RAY_TOKEN=TOKEN)
    port = serving.address.rpartition(":")[2]
    try:
        assert serving.http.get("/health").status_code == 200
        assert (serving.http.get("/info").status_code, serving.act(observed()).status_code) == (401, 401)
        assert serving.act(observed(), Authorization=f"Bearer {TOKEN}x").status_code == 401
        assert serving.act(observed(), Authorization=f"Bearer {TOKEN}").status_code == 200
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"ws://127.0.0.1:{port}/vla-eval")
        assert WebsocketClientPolicy("127.0.0.1", int(port), api_key=TOKEN).get_server_metadata()["run"] == "small"
    finally:
        serving.end()


@pytest.mark.parametrize(("flags", "says"), [
    (["--host", "0.0.0.0"], "lets other machines in: set $COSMOS_RAY_TOKEN"), (["--host", "no.such.host.invalid"], "lets other machines"),
    (["--port", "70000"], "no port"), (["--queue", "0"], "--queue 0"), (["--checkpoint", "base"], "there is no base policy to serve"),
    (["--plan", "--planner.candidates", "1"], "--plan chooses among candidates"), (["--round", "3"], "round 3")])
def test_a_wrong_flag_is_one_line(run, handlers, capsys, monkeypatch, flags, says):
    monkeypatch.delenv("COSMOS_RAY_TOKEN", raising=False)
    flags = flags if "--port" in flags else [*flags, "--port", "0"]
    assert main(["serve", "--root", str(run.parent), "--name", run.name, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_replies_are_sent_without_delay():
    """asyncio turns Nagle's algorithm off where a socket names its protocol; else a reply waits 40 ms for an acknowledgement."""
    with bound("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_a_port_that_is_taken_is_one_line(serving, run, handlers, capsys):
    assert main(["serve", "--root", str(run.parent), "--name", run.name, "--port", serving.address.rpartition(":")[2]]) == 2
    assert "give another --host or --port" in capsys.readouterr().err


# ---------------------------------------------------------------- openpi


def test_openpi_client_gets_chunks(serving, policy):
    host, _, port = serving.address.partition(":")
    client = WebsocketClientPolicy(host, int(port))
    assert client.get_server_metadata()["chunk"] == 8
    mine = observed()
    theirs = {"observation/image": mine["primary_image"], "observation/wrist_image": mine["wrist_image"],
              "observation/state": mine["proprio"], "prompt": LIFT}
    for observation in (mine, theirs):
        reply = client.infer(observation)
        assert np.array_equal(reply["actions"], policy.get_action(mine).actions) and reply["server_timing"]["infer_ms"] > 0
    with pytest.raises(RuntimeError, match="the observation lacks 'proprio'"):
        client.infer({key: value for key, value in mine.items() if key != "proprio"})
    assert client.infer(mine)["actions"].shape == (8, 4)  # the connection outlives a bad request
    client.reset()


# ---------------------------------------------------------------- vla-eval


IMAGE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
SEEN = {"images": {"agentview": IMAGE, "wrist": IMAGE}, "task_description": LIFT,
        "states": np.array([0.1, 0.2, 0.9, 0.0, 2.0, 0.0, 0.04, -0.04]), "controller_states": np.zeros(8, np.float32)}


def test_vla_evals_client_gets_one_action_at_a_time(serving, policy):
    """vla-eval's own client, which sends PNG; what LIBERO sends of the state."""
    async def episodes() -> tuple[dict, list]:
        async with Connection(f"ws://{serving.address}/vla-eval") as client:
            actions = []
            for steps in (3, 1):  # a new episode begins with a new chunk
                await client.start_episode({"task": {"name": "x", "suite": "libero_goal", "task_id": 0, "episode_idx": 0}})
                actions += [(await client.act(SEEN))["actions"] for _ in range(steps)]
                await client.end_episode({"steps": steps, "metrics": {"success": False}})
            return client.server_info, actions

    told, actions = asyncio.run(episodes())
    assert told["observation_params"] == {"send_wrist_image": True, "send_state": True} and told["protocol_version"] == 1
    proprio = np.array([0.04, -0.04, 0.1, 0.2, 0.9, 0.0, np.sin(1.0), 0.0, np.cos(1.0)], np.float32)
    mine = policy.get_action({"primary_image": IMAGE, "wrist_image": IMAGE, "proprio": proprio}, LIFT).actions
    for got, wanted in zip(actions, (mine[0], mine[1], mine[2], mine[0]), strict=True):
        assert np.array_equal(got, wanted)


def test_vla_evals_client_raises_what_is_wrong_with_an_observation(serving):
    async def ask() -> None:
        async with Connection(f"ws://{serving.address}/vla-eval") as client:
            with pytest.raises(RuntimeError, match="has images, states and task_description"):
                await client.act({"images": {}})
            assert (await client.act(SEEN))["actions"].shape == (4,)

    asyncio.run(ask())


def test_what_is_no_message_of_vla_eval_gets_an_error(serving):
    with connect(f"ws://{serving.address}/vla-eval", compression=None) as client:
        for bad in (b"\xc1", msgpack.packb([1]), msgpack.packb({"type": "nonsense", "payload": {}, "seq": 1, "timestamp": 0})):
            client.send(bad)
            assert client.recv(timeout=60).startswith("error: ")
        client.send("text")
        assert "binary" in client.recv(timeout=60)
        client.send(msgpack.packb({"type": "hello", "payload": {}, "seq": 7, "timestamp": 0.0}))  # the connection outlives them
        reply = msgpack.unpackb(client.recv(timeout=60))
        assert (reply["type"], reply["seq"]) == ("hello", 7)


# ---------------------------------------------------------------- recorded episodes


def test_served_episodes_are_recorded_with_their_outcome(serving, run):
    serving.act(observed(episode="first"))
    assert serving.act(observed(episode="first", executed=5)).status_code == 200
    moved = np.full((3, 4), 0.5, np.float32)
    assert serving.act(observed(episode="first", executed=moved)).status_code == 200
    outcome = {"success": True, "executed": 4, "observation": observed(proprio=np.full(9, 0.25, np.float32))}
    reply = serving.http.post("/episodes/first", content=json_numpy.dumps(outcome))
    assert reply.status_code == 200 and reply.json()["steps"] == 12 and reply.json()["new"]
    episode = ReplayStore(str(run / "replay")).read(reply.json()["stored"])
    assert episode.success and episode.policy_version == 1 and sorted(episode.frames) == [0, 5, 8, 12]
    assert np.array_equal(episode.actions[5:8], moved) and np.all(episode.proprio[12] == 0.25)
    assert [decision["step"] for decision in episode.info["decisions"]] == [0, 5, 8]
    assert serving.http.get("/info").json()["recorded"] >= 1
    again = serving.http.post("/episodes/first", content=json.dumps({"success": True}))
    assert again.status_code == 404 and "no episode 'first' has begun" in again.json()["error"]


def test_a_refused_request_leaves_its_episode_as_it_was(serving, run):
    serving.act(observed(episode="second"))
    assert serving.act(observed(episode="second", executed=9)).status_code == 422
    assert serving.act(observed(episode="second", executed=8, proprio=np.zeros(2))).status_code == 422
    assert serving.act(observed(episode="second", executed=8)).status_code == 200
    for bad in ({}, {"success": 1}, {"success": True, "wrong": 1}, {"success": True, "score": 2}, {"success": True, "observation": {}}):
        assert serving.http.post("/episodes/second", content=json.dumps(bad)).status_code == 422
    reply = serving.http.post("/episodes/second", content=json.dumps({"success": False, "executed": 2}))
    episode = ReplayStore(str(run / "replay")).read(reply.json()["stored"])
    assert not episode.success and len(episode.actions) == 10 and sorted(episode.frames) == [0, 8]


def test_episodes_without_recording_are_refused(run):
    serving = Serving(run)
    try:
        assert serving.act(observed(episode="x")).status_code == 422
        assert serving.http.post("/episodes/x", content="{}").status_code == 404
    finally:
        assert "recorded 0 episodes" in serving.end()
    assert not list(run.glob("replay/*x*"))


# ---------------------------------------------------------------- fuzz


def test_malformed_requests_get_a_status_and_nothing_grows(serving):
    """Some here; ``jobs/bench/serve.py`` sends 10,000."""
    from jobs.bench.serve import malformed

    statuses = {serving.act(body).status_code for body in malformed(150, seed=3)}
    assert statuses <= {200, 400, 413, 422} and 400 in statuses and 422 in statuses
    assert serving.http.get("/health").status_code == 200
