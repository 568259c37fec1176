"""Everything whose figure needs a GPU, in one command of at most nine minutes.

    make bench-gpu                                              # writes gpu.json and gpu.md
    python jobs/bench/gpu.py --json gpu.json --page gpu.md --parts planning,training
    python jobs/bench/gpu.py --small --json gpu.json            # every part at small size on a CPU, as the tests run them

The parts run one after another, the most important first. Each is a process of its own with its own time limit: a part that fails or
overruns is named with its reason, and the others run. The JSON and the page are written anew after every part. Random weights of the real
shapes take as long as trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LARGE = ("--preset", "cosmos-predict2-2b")
SMALL_PATIENCE = 4  #: times the limit, on a CPU that others use too
SMALL_NET = ("--preset", "tiny", "--layers", "1", "--seconds", "0.01", "--rounds", "1", "--variants", "", "--device", "cpu")


@dataclass(frozen=True)
class Part:
    """A benchmark as a process."""

    name: str
    limit_s: float
    command: tuple[str, ...]  #: a script beside this one, and its flags
    small: tuple[str, ...]  #: the same at small size


PARTS = (
    Part("evaluation", 120, ("model.py", *LARGE, "--batch", "1,8,4,16", "--frames", "9", "--rounds", "5"),
         ("model.py", *SMALL_NET, "--batch", "1,8,4,16", "--frames", "9")),
    Part("planning", 130, ("gpu_parts.py", "planning"), ("gpu_parts.py", "planning", "--small")),
    Part("training", 60, ("model.py", *LARGE, "--train", "--batch", "1,4", "--frames", "9", "--rounds", "3"),
         ("model.py", *SMALL_NET, "--train", "--batch", "1,4", "--frames", "9")),
    Part("turn", 130, ("gpu_parts.py", "turn"), ("gpu_parts.py", "turn", "--small")),
    Part("vae", 30, ("gpu_parts.py", "vae"), ("gpu_parts.py", "vae", "--small")),
    Part("weights", 30, ("gpu_parts.py", "weights"), ("gpu_parts.py", "weights", "--small")),
    Part("rendering", 30, ("gpu_parts.py", "rendering"), ("gpu_parts.py", "rendering", "--small")),
)

#: Every figure of the page: what it is, and what it should be ("" where nothing was promised).
FIGURES = {
    "of_matmul_ceiling_b8": ("2B evaluation at batch 8, share of the matmul ceiling", "at least 0.60"),
    "vs_diffusers_eager_b1": ("2B evaluation at batch 1, eager, over diffusers' class", "at least 1.15"),
    "compiled_vs_eager_b1": ("2B evaluation at batch 1, compiled or as a graph, over eager", "at least 1.5"),
    "of_matmul_ceiling_b1": ("share of the matmul ceiling at batch 1", ""),
    "of_matmul_ceiling_b4": ("share of the matmul ceiling at batch 4", ""),
    "of_matmul_ceiling_b16": ("share of the matmul ceiling at batch 16", ""),
    "gpu_exact_vs_serial": ("exact plan, N = 8, over batches of one row without decodes", "at least 1.5"),
    "gpu_exact_vs_public": ("exact plan over the public pattern, with its encodes and decodes", "at least 3"),
    "plan_exact_ms": ("exact plan from camera images, 488 evaluations", ""),
    "plan_few_steps_ms": ("plan by V(s') with few steps, the trained network unchanged", "at most 500"),
    "plan_all_levers_ms": ("plan by V(s') with every lever; needs a network trained with one-way attention", "at most 150"),
    "plan_joint_ms": ("plan by the joint value with every lever", "at most 100"),
    "training_mfu_b1": ("2B training step, ZeRO-1 and checkpointing, batch 1: share of the ceiling", ""),
    "training_mfu_b4": ("the same at batch 4", ""),
    "turn_s": ("one turn of the loop: demonstrations, 2 steps, 4 rollouts, 5 steps with pushes, planned episodes", ""),
    "turn_peak_gb": ("GPU memory that the turn took at its peak, all processes", ""),
    "vae_encode_ms": ("VAE, current frames of one observation", ""),
    "vae_decode_ms": ("VAE, future frames of one observation", ""),
    "weights_pack_ms": ("weights off the GPU, summed", ""),
    "weights_write_ms": ("weights into a network on the GPU", ""),
    "render_beside_cuda": ("pictures a second while CUDA works in the same process, over alone", ""),
    "render_apart_from_cuda": ("pictures a second while CUDA works in another process, over alone", ""),
}


def say(text: str) -> None:
    print(text, flush=True)


def run(part: Part, small: bool, into: Path) -> str:
    """Run a part, which writes its figures to ``into``; returns why it failed, "" if it did not."""
    script, *flags = part.small if small else part.command
    limit_s = part.limit_s * (SMALL_PATIENCE if small else 1)
    command = [sys.executable, str(HERE / script), *flags, "--json", str(into)]
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, stderr=subprocess.STDOUT,
                               stdout=subprocess.PIPE, text=True, errors="replace")
    try:
        text = process.communicate(timeout=limit_s)[0]
        say("\n".join(f"  {line}" for line in text.splitlines()[-30:]))
        lines = [line for line in text.splitlines() if line.strip()]
        return "" if process.returncode == 0 else f"exit code {process.returncode}: {lines[-1][:200] if lines else 'no output'}"
    except subprocess.TimeoutExpired:
        return f"not done within {limit_s:g} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
        except ProcessLookupError:
            pass
        process.wait()


def page(results: dict[str, float], failed: dict[str, str], device: str) -> str:
    """The figures as Markdown."""
    rows = [f"| {what} | {wanted or '–'} | {f'{results[key]:.4g}' if key in results else 'not measured'} |"
            for key, (what, wanted) in FIGURES.items()]
    lines = [f"Measured on: {device}", "", "| figure | wanted | measured |", "|---|---|---|", *rows]
    return "\n".join([*lines, *(["", *(f"- {name} failed: {why}" for name, why in failed.items())] if failed else []), ""])


def device_name() -> str:
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU', 'torch', torch.__version__)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def main(parts: tuple[Part, ...] = PARTS, arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", default=",".join(part.name for part in parts), help="parts to run, in this order")
    parser.add_argument("--small", action="store_true", help="every part at small size, on a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--page", metavar="FILE", help="write the figures as Markdown")
    options = parser.parse_args(arguments)
    known = {part.name: part for part in parts}
    if unknown := [name for name in options.parts.split(",") if name not in known]:
        parser.error(f"there is no part {unknown[0]!r}: the parts are {', '.join(known)}")
    device = device_name()
    if not options.small and device.startswith("a CPU"):
        say("error: torch sees no GPU here; --small runs every part at small size on a CPU")
        return 2
    results: dict[str, float] = {}
    failed: dict[str, str] = {}
    for part in (known[name] for name in options.parts.split(",")):
        say(f"{part.name}, at most {part.limit_s:g} s")
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            if why := run(part, options.small, file := Path(folder) / "part.json"):
                failed[part.name] = why
            if file.exists():  # what it had measured until then
                results |= json.loads(file.read_text())
        say(f"{part.name}: {failed.get(part.name, 'done')} ({time.monotonic() - began:.0f} s)")
        kept = {key: results[key] for key in FIGURES if key in results}
        if options.json:
            Path(options.json).write_text(json.dumps(kept, indent=1))
        if options.page:
            Path(options.page).write_text(page(kept, failed, device))
    say(page({key: results[key] for key in FIGURES if key in results}, failed, device))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
