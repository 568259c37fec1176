"""A GPU that was asked for and is not there is refused before anything runs. Ray counts the GPUs that a test tells it to have."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from cosmos_ray.asks import check_cluster
from cosmos_ray.commands.cli import main
from cosmos_ray.commands.command import COMMANDS
from cosmos_ray.config.settings import from_values, parse_values
from cosmos_ray.errors import ConfigError
from cosmos_ray.placement import cluster_nodes
from tests.conftest import ROOT, environment
from tests.test_command_line import make_run

ASK = """
    import sys
    import ray
    from cosmos_ray.config.settings import from_values, parse_values
    from cosmos_ray.asks import check_cluster
    from cosmos_ray.connection import start_private
    from cosmos_ray.errors import ConfigError
    from cosmos_ray.placement import cluster_nodes
    start_private(num_cpus=1, num_gpus=2)
    for line in sys.stdin.read().splitlines():
        words, acts, learns = line.split(";")
        flags = dict(word.split("=") for word in words.split())
        try:
            check_cluster(from_values(parse_values(flags)), cluster_nodes(), acts == "acts", learns == "learns", False, private=False)
            print("fine")
        except ConfigError as error:
            print(error)
"""
FEW = "2 GPUs are too few for 1 inference actors with inference.gpus = 1.5 and 1 learner ranks: lower inference.gpus"
#: settings and what the command does -> what is said on a cluster of one machine with two GPUs
CASES = {
    "inference.gpus=1 inference.actors=2;acts;": "fine",
    "inference.gpus=1 inference.actors=3;acts;":
        "inference.gpus = 1 for 3 inference actors asks for 3 GPUs, Ray has 2: lower inference.gpus or inference.actors",
    "inference.gpus=1 inference.actors=3;;learns": "fine",
    "learner.gpus=1 learner.world_size=4;;learns":
        "learner.gpus = 1 for 4 learner ranks asks for 4 GPUs, Ray has 2: lower learner.gpus or learner.world_size",
    "learner.accelerate=graphs;;learns": "fine",
    "inference.gpus=1.5 learner.gpus=1;acts;learns": FEW,
}  # fmt: skip


def test_a_cluster_with_fewer_gpus_than_asked_for_is_refused_with_both_numbers():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ASK)], input="\n".join(CASES), capture_output=True, text=True, timeout=120,
                          env=environment(), cwd=ROOT)
    said = done.stdout.splitlines()
    assert len(said) == len(CASES), done.stderr[-2000:]
    assert [line[: len(expected)] for line, expected in zip(said, CASES.values(), strict=True)] == list(CASES.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command, flags, complaint", [
    ("pretrain", ["--learner.gpus", "1"], "learner.gpus = 1 for 1 learner ranks asks for 1 GPUs, Ray has 0: set learner.gpus to 0"),
    ("plan", ["--inference.gpus", "0.3"], "inference.gpus = 0.3 asks for a GPU, and torch can use none here: set inference.gpus to 0"),
    ("report", ["--inference.gpus", "1", "--inference.accelerate", "both"], "and inference.accelerate to 'none'"),
])
def test_a_machine_without_a_gpu_refuses_what_needs_one(command, flags, complaint, tmp_path):
    make_run(tmp_path, "door")
    done = subprocess.run([sys.executable, "-m", "cosmos_ray", command, "--root", str(tmp_path), "--name", "door", *flags],
                          capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert done.returncode == 2 and complaint in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "door" / "checkpoints").exists()


def test_graphs_without_a_gpu_are_refused(local_ray):
    if any(node.gpus for node in cluster_nodes()):
        pytest.skip("needs a machine without a GPU")
    config = from_values(parse_values({"learner.accelerate": "graphs"}))
    with pytest.raises(ConfigError, match="'graphs' needs a GPU for every learner rank, and Ray has no GPU"):
        check_cluster(config, cluster_nodes(), acts=False, learns=True, simulates=False, private=True)


def test_which_commands_act_and_which_learn():
    acting = [name for name, command in COMMANDS.items() if command.use.acts]
    assert acting == ["demo", "rollout", "refine", "evaluate", "plan", "audit", "serve", "report"]
    assert [name for name, command in COMMANDS.items() if command.use.learns] == ["demo", "pretrain", "refine"]
    assert main(["rollout", "--name", "x", "--inference.accelerate", "graphs"]) == 2
