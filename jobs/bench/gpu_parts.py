"""The parts of jobs/bench/gpu.py that no other benchmark has: planning at 2B, a turn of the loop, the VAE, weights, rendering beside CUDA.

    python jobs/bench/gpu_parts.py planning --json planning.json     # on a GPU
    python jobs/bench/gpu_parts.py planning --small                  # a network of few channels, on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from cosmos_ray.config import ModelConfig, PlannerConfig
from cosmos_ray.config.tasks import task_instruction
from cosmos_ray.model.latents import current_latents, read_future_images
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.speed.accelerate import accelerate
from cosmos_ray.planning.best_of_n import best_of_n
from cosmos_ray.weights import pack, write
from jobs.bench import serial_planner
from jobs.bench.planning import ACT_STEPS, PAPER, random_states

TASK = "Lift"
CAMERAS = ("robot0_eye_in_hand", "agentview")
FEW = PlannerConfig(candidates=8)  #: one future of one evaluation, one value of one evaluation
SMALL = {"width": 64, "heads": 2, "layers": 2, "image_size": 32}


class Bench:
    """What every part needs: where it runs, and files of random weights."""

    def __init__(self, small: bool, json_file: str | None, folder: Path):
        self.small, self.json_file, self.folder = small, json_file, folder
        self.device = "cpu" if small else "cuda"
        self.results: dict[str, float] = {}

    def add(self, key: str, value: float) -> None:
        self.results[key] = value
        print(f"{key:<24} {value:10.3f}", flush=True)
        if self.json_file:
            Path(self.json_file).write_text(json.dumps(self.results))

    def files(self) -> dict[str, str]:
        """``tokenizer_path`` and ``text_path`` of a VAE and of embeddings with random numbers."""
        from diffusers import AutoencoderKLWan

        vae, text = self.folder / "vae", self.folder / "text.safetensors"
        if not vae.exists():
            torch.manual_seed(0)
            size = {"base_dim": 8, "num_res_blocks": 1} if self.small else {"base_dim": 96, "num_res_blocks": 2}
            AutoencoderKLWan(z_dim=16, dim_mult=[1, 2, 4, 4], **size).save_pretrained(vae)
            words = torch.zeros(512, 1024)
            words[:8] = torch.randn(8, 1024)
            save_file({task_instruction(TASK): words}, text)
        return {"tokenizer_path": str(vae), "text_path": str(text)}

    def policy(self, attention: str = "full") -> CosmosPolicy:
        config = ModelConfig(preset="cosmos-predict2-2b", attention=attention, **self.files(), **(SMALL if self.small else {}))
        policy = build(make_spec(config, CAMERAS, 7, 9), seed=0)
        torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.02, generator=torch.Generator().manual_seed(5))
        policy = policy.place(self.device, torch.float32 if self.small else torch.bfloat16).eval()
        policy.serve()
        return policy

    def ms(self, call: Callable[[], object], seconds: float = 2.0, warm: int = 2) -> float:
        """Median milliseconds of a call."""
        if self.small:
            seconds, warm = 0.0, min(warm, 1)
        times: list[float] = []
        for _ in range(warm):
            call()
        began = time.perf_counter()
        while not times or time.perf_counter() - began < seconds:
            self.sync()
            since = time.perf_counter()
            call()
            self.sync()
            times.append(1000 * (time.perf_counter() - since))
        return statistics.median(times)

    def sync(self) -> None:
        if not self.small:
            torch.cuda.synchronize()


def planning(bench: Bench) -> None:
    exact_and_few(bench, bench.policy())
    policy = bench.policy("one-way")
    if not bench.small:
        accelerate(policy, "both")
    images, proprio, _ = random_states(policy.spec, 1)
    bench.add("plan_all_levers_ms", bench.ms(lambda: plan(policy, images, proprio, 1, FEW)))
    bench.add("plan_joint_ms", bench.ms(lambda: plan(policy, images, proprio, 1, replace(FEW, rank_by="joint"))))


def exact_and_few(bench: Bench, policy: CosmosPolicy) -> None:
    images, proprio, _ = random_states(policy.spec, 1)
    paper = PAPER if not bench.small else replace(PAPER, candidates=2, futures=1, value_samples=2)

    def serial(decodes: bool) -> None:
        known = current_latents(policy, images, proprio)
        for _ in range(paper.candidates if decodes else 0):  # each encodes the state, and decodes each future to look at it
            known = current_latents(policy, images, proprio)
            for _ in range(paper.futures):
                read_future_images(policy, known, images)
        serial_planner.plan(policy, known, policy.embed([task_instruction(TASK)]), 3, ACT_STEPS, paper)

    one_row = bench.ms(lambda: serial(False), 0.0, 1)
    public = bench.ms(lambda: serial(True), 0.0, 0)
    if not bench.small:
        accelerate(policy, "both")
    bench.add("plan_few_steps_ms", bench.ms(lambda: plan(policy, images, proprio, 5, FEW)))
    exact = bench.ms(lambda: plan(policy, images, proprio, ACT_STEPS, paper))
    bench.add("plan_exact_ms", exact)
    bench.add("gpu_exact_vs_serial", one_row / exact)
    bench.add("gpu_exact_vs_public", public / exact)


def plan(policy: CosmosPolicy, images: np.ndarray, proprio: np.ndarray, steps: int, config: PlannerConfig) -> torch.Tensor:
    """The chosen chunk, from camera images."""
    known, text = current_latents(policy, images, proprio), policy.embed([task_instruction(TASK)])
    return best_of_n(policy, known, text, torch.tensor([3]), steps, config).actions.cpu()


def vae(bench: Bench) -> None:
    policy = bench.policy()
    images, proprio, _ = random_states(policy.spec, 1)
    bench.add("vae_encode_ms", bench.ms(lambda: current_latents(policy, images, proprio)))
    known = current_latents(policy, images, proprio)
    bench.add("vae_decode_ms", bench.ms(lambda: policy.tokenizer.decode(known.to(policy.device), policy.layout.future_images)))


def weights(bench: Bench) -> None:
    policy, other = bench.policy(), bench.policy()
    record = pack(policy.net.named_parameters(), 1)
    bench.add("weights_pack_ms", bench.ms(lambda: pack(policy.net.named_parameters(), 1), 3.0))
    bench.add("weights_write_ms", bench.ms(lambda: write(record, other.net), 3.0))


def turn_flags(bench: Bench) -> list[str]:
    """Arguments of `demo`: every stage at the smallest counts, with the networks of these shapes."""
    files = bench.files()
    flags = {"root": bench.folder / "runs", "name": "turn", "demos": 1, "pretrain-steps": 2, "rollouts": 4, "refine-steps": 5,
             "planning-steps": 0, "refine-rollouts": 0, "rounds": 1, "publish-every": 5, "eval-episodes": 1, "sim.task": TASK,
             "sim.horizon": 64, "rollout.workers": 1, "rollout.envs-per-worker": 2, "model.preset": "cosmos-predict2-2b",
             "model.tokenizer-path": files["tokenizer_path"], "model.text-path": files["text_path"], "learner.batch-size": 2,
             "learner.threads": 1, "planner.candidates": 4 if bench.small else 8}
    if bench.small:
        flags |= {f"model.{name.replace('_', '-')}": value for name, value in SMALL.items()} | {"sim.image-size": 32}
    else:
        flags |= {"inference.gpus": 0.4, "learner.gpus": 0.6, "learner.activation-checkpointing": "true"}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def turn(bench: Bench) -> None:
    """`demo` itself."""
    command = [sys.executable, "-m", "cosmos_ray", "demo", *turn_flags(bench)]
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], (total - free) / 1e9)

    watching = threading.Thread(target=watch)
    if not bench.small:
        watching.start()
    began = time.perf_counter()
    try:
        ran = subprocess.run(command, capture_output=True, text=True)
    finally:
        done.set()
    if ran.returncode:
        raise SystemExit((ran.stderr or ran.stdout).strip().splitlines()[-1])
    bench.add("turn_s", time.perf_counter() - began)
    bench.add("turn_peak_gb", peak[0])


def rendering(bench: Bench) -> None:
    """Pictures a second: alone, with matrix products in another thread of the process, and in another process."""
    size = 128 if bench.small else 4096

    def multiply(until: threading.Event) -> None:
        a = torch.randn(size, size, device=bench.device)
        while not until.is_set():
            a @ a
            bench.sync()

    from cosmos_ray.config import SimConfig
    from cosmos_ray.sim.environment import Environment

    env = Environment(SimConfig(task=TASK, image_size=64 if bench.small else 256))
    env.reset(0)
    state = env.state()

    def speed() -> float:
        return 1000 / bench.ms(lambda: env.render_state(state), 3.0)

    alone, until = speed(), threading.Event()
    busy = threading.Thread(target=multiply, args=(until,))
    busy.start()
    beside = speed()
    until.set()
    busy.join()
    code = f"import torch\na = torch.randn({size}, {size}, device={bench.device!r})\nprint(flush=True)\nwhile True:\n    a @ a\n"
    code += "" if bench.small else "    torch.cuda.synchronize()\n"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        apart = speed()
    finally:
        other.kill()
    bench.add("render_beside_cuda", beside / alone)
    bench.add("render_apart_from_cuda", apart / alone)


def main() -> None:
    parts = {part.__name__: part for part in (planning, turn, vae, weights, rendering)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--small", action="store_true", help="a network of few channels, on a CPU")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.small else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, torch.no_grad():
        parts[options.part](Bench(options.small, options.json, Path(folder)))


if __name__ == "__main__":
    main()
