"""The network's speed against diffusers' class and against the matmul ceiling of the same device, in one process.

    python jobs/bench/model.py                                   # the tiny preset, on this machine's CPU or GPU
    python jobs/bench/model.py --preset cosmos-predict2-2b       # the 2B dimensions in bf16, for a GPU
    python jobs/bench/model.py --train --json training.json      # a training step instead

Every variant is timed in turn, round after round, so that a ratio compares neighbours in time; it is printed as the median over
rounds with the range of the middle half. "ours" is an evaluation as the sampler makes it, with the prompt's keys and the
timestep's modulation computed before; "ours, nothing kept" computes them anew. Both classes hold the same parameters, and their
outputs are compared before anything is timed.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from cosmos_ray.config import LearnerConfig, ModelConfig  # noqa: E402
from cosmos_ray.model.prompts import make_prompts  # noqa: E402
from cosmos_ray.model.reference import DiffusersTwin  # noqa: E402
from cosmos_ray.model.spec import PolicySpec, make_spec  # noqa: E402
from cosmos_ray.model.speed.accelerate import compile_network  # noqa: E402
from cosmos_ray.model.speed.cuda_graph import capture  # noqa: E402
from cosmos_ray.model.transformer import Transformer, TransformerConfig  # noqa: E402

CAMERAS = {7: ("a",), 9: ("a", "b"), 11: ("a", "b", "c")}
PROMPT = 12  #: words of the prompt; the rows after it are zero, as in the released embeddings


class Case:
    """Inputs of one batch size and number of frames."""

    def __init__(self, spec: PolicySpec, rows: int, frames: int, device: str, dtype: torch.dtype):
        config, side, g = spec.transformer, spec.frame_shape[1], torch.Generator().manual_seed(0)
        self.rows, self.frames = rows, frames
        self.latents = torch.randn(rows, config.channels, frames, side, side, generator=g).to(device, dtype)
        self.clean = torch.zeros(1, frames, device=device)
        self.clean[:, : frames // 2] = 1
        self.timesteps = (1 - self.clean) * 0.9
        tokens = torch.zeros(spec.text_tokens, config.text_width)
        tokens[:PROMPT] = torch.randn(min(PROMPT, spec.text_tokens), config.text_width, generator=g)
        self.prompts = make_prompts([tokens] * rows, torch.device(device))
        self.prompts = dataclasses.replace(self.prompts, tokens=self.prompts.tokens[:1], bias=None if self.prompts.bias is None else
                                           self.prompts.bias[:1], rows=torch.zeros_like(self.prompts.rows))  # one prompt, shared
        self.tokens = tokens.expand(rows, -1, -1).to(device)
        #: of an evaluation as the sampler makes it; the other variants do more, none of it useful
        self.flops = rows * config.flops(frames, side, side, self.prompts.tokens.shape[1], kept=True)

    def every_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean mask and timesteps, (B, T) each."""
        return self.clean.expand(self.rows, -1), self.timesteps.expand(self.rows, -1)


def clock(device: str, call, seconds: float) -> float:
    """Milliseconds a call takes, over as many as fill ``seconds``."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sync()
    began, calls = time.perf_counter(), 0
    while True:
        call()
        calls += 1
        if calls in (1, 4) or calls % 16 == 0:
            sync()
            if time.perf_counter() - began > seconds:
                return (time.perf_counter() - began) / calls * 1e3


def rounds(device: str, calls: dict, seconds: float, count: int) -> dict[str, list[float]]:
    """Milliseconds of every call, ``count`` times in turn."""
    for call in calls.values():  # compile, choose kernels, fill caches
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            times[name].append(clock(device, call, seconds))
    return times


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """(median, lower and upper quartile) of ``slow / fast``, round by round; with one round, three times that."""
    values = sorted(a / b for a, b in zip(slow, fast, strict=True))
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return statistics.median(values), low, high


def captured(call):
    """``call`` as one CUDA graph."""
    return capture(call, torch.cuda.Stream())[0].replay


class Float8Linear(torch.nn.Module):
    """A linear layer in fp8 with one scale per tensor, the input's taken as it comes; for this benchmark only."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        top = torch.finfo(torch.float8_e4m3fn).max
        self.scale = (layer.weight.abs().max().float() / top).reshape(())
        self.weight = (layer.weight.float() / self.scale).to(torch.float8_e4m3fn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max).clamp_min(1e-12)
        flat = (x.flatten(0, -2) / scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(flat, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype)
        return out.unflatten(0, x.shape[:-1])


def in_float8(net: Transformer) -> Transformer:
    """The attention and MLP projections of every block in fp8, where the sizes allow it."""
    for block in net.blocks:
        for part in (block.self_attn, block.cross_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(part, name, Float8Linear(layer))
    return net


def ceiling(device: str, dtype: torch.dtype, config: TransformerConfig, tokens: int, seconds: float) -> tuple[float, str]:
    """(TFLOP/s, shape) of the fastest of a few plain matrix products, among them the model's own widest."""
    best = (0.0, "")
    square = (4096, 8192) if device == "cuda" else (1024,)
    for m, k, n in [(tokens, config.width, int(config.width * config.mlp_ratio)), *((size,) * 3 for size in square)]:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        for _ in range(3):
            F.linear(a, b)
        ms = min(clock(device, lambda a=a, b=b: F.linear(a, b), seconds / 3) for _ in range(3))
        best = max(best, (2 * m * k * n / ms / 1e9, f"{m}x{k}x{n}"))
    return best


def show(case: Case, name: str, times: list[float], flops: float, top: float) -> None:
    """One line of the table."""
    ms = statistics.median(times)
    speed = flops / ms / 1e9
    print(f"{case.frames:3d} frames  batch {case.rows:2d}  {name:<26} {ms:9.3f} ms  {speed:8.3f} TFLOP/s  "
          f"{100 * speed / top:5.1f} % of ceiling", flush=True)


def variants(options, case: Case, net: Transformer, twin: DiffusersTwin, device: str) -> dict:
    """The calls to time, by name."""
    prompts, kept, modulation = case.prompts, net.attend_to(case.prompts), net.modulate(case.timesteps)

    def ours(network=net):
        return network(case.latents, case.clean, case.timesteps, kept, modulation)

    calls = {
        "diffusers, eager": lambda: twin(case.latents, *case.every_row(), case.tokens),
        "ours, nothing kept, eager": lambda: net(case.latents, *case.every_row(), prompts),
        "ours, eager": ours,
    }
    theirs, mine = calls["diffusers, eager"]().float(), ours().float()
    apart = float((mine - theirs).abs().max() / theirs.abs().max())
    if apart > (1e-5 if case.latents.dtype == torch.float32 else 5e-2):
        raise SystemExit(f"the two classes disagree by {apart:.1e}: there is nothing to compare")
    if "compiled" in options.variants:
        fast = _like(net)
        compile_network(fast, by_block=False)
        calls["ours, compiled"] = lambda: ours(fast)
    if device == "cuda" and "graphs" in options.variants:
        calls["ours, graph"] = captured(ours)
        if "compiled" in options.variants:
            blocks = _like(net)
            compile_network(blocks, by_block=True)
            calls["ours, compiled, graph"] = captured(lambda: ours(blocks))
    if device == "cuda" and "fp8" in options.variants and torch.cuda.get_device_capability() >= (8, 9):
        eight = in_float8(_like(net))
        compile_network(eight, by_block=False)
        calls["ours, fp8, compiled"] = lambda: ours(eight)
    return calls


def bench_inference(options, spec: PolicySpec, net: Transformer, device: str, dtype: torch.dtype, top: float) -> dict[str, float]:
    """Time every case; returns the ratios of the first number of frames."""
    out: dict[str, float] = {}
    twin = DiffusersTwin(net)
    for frames in options.frames:
        for rows in options.batch:
            torch._dynamo.reset()
            case = Case(spec, rows, frames, device, dtype)
            times = rounds(device, variants(options, case, net, twin, device), options.seconds, options.rounds)
            for name, values in times.items():
                show(case, name, values, case.flops, top)
            if frames == options.frames[0]:
                out.update(ratios(times, rows, case.flops, top))
                save(options, out)
    return out


def _like(net: Transformer) -> Transformer:
    """A second network with copies of the parameters."""
    other = Transformer(net.config).to(next(net.parameters()))
    other.load_state_dict(net.state_dict())
    return other.eval()


def ratios(times: dict[str, list[float]], rows: int, flops: float, top: float) -> dict[str, float]:
    """The published ratios of one batch size, printed with their spread."""
    exact = (name for name in times if name.startswith("ours") and "fp8" not in name)
    ours = sorted(exact, key=lambda name: statistics.median(times[name]))
    compiled = next((name for name in ours if "compiled" in name), None)
    out = {}
    for key, slow, fast in ((f"vs_diffusers_eager_b{rows}", "diffusers, eager", "ours, eager"),
                            (f"vs_diffusers_eager_nothing_kept_b{rows}", "diffusers, eager", "ours, nothing kept, eager"),
                            (f"compiled_vs_eager_b{rows}", "ours, eager", compiled)):
        if fast in times:
            out[key], low, high = ratio(times[slow], times[fast])
            print(f"    {key} = {out[key]:.2f} [{low:.2f}, {high:.2f}]" + (f"  ({fast})" if fast == compiled else ""), flush=True)
    key = f"of_matmul_ceiling_b{rows}"
    out[key], low, high = ratio([flops / top / 1e9] * len(times[ours[0]]), times[ours[0]])
    print(f"    {key} = {out[key]:.3f} [{low:.3f}, {high:.3f}]  ({ours[0]})", flush=True)
    return out


def bench_training(options, spec, net: Transformer, device: str, dtype: torch.dtype, top: float) -> dict[str, float]:
    """Steps of the DeepSpeed engine on the network alone, ZeRO-1 and activation checkpointing: time, memory and MFU per batch size."""
    from cosmos_ray.learner.engine import make_engine, rendezvous

    os.environ.update(rendezvous(0, 1, "127.0.0.1", 29517))
    net.train().requires_grad_(True)
    net.checkpointing = True
    config = LearnerConfig(batch_size=1, zero_stage=1, precision="bf16" if dtype == torch.bfloat16 else "fp32")
    engine = make_engine(config, net, device)
    out = {}
    for rows in options.batch:
        case = Case(spec, rows, options.frames[0], device, dtype)

        def step(case=case):
            loss = engine(case.latents, *case.every_row(), case.prompts).float().square().mean()
            engine.backward(loss)
            engine.step()

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = rounds(device, {"step": step}, options.seconds, options.rounds)["step"]
        flops = 3 * case.flops  # forward and backward; recomputed activations do not count
        show(case, "training step", times, flops, top)
        out[f"training_mfu_b{rows}"] = flops / statistics.median(times) / 1e9 / top
        if device == "cuda":
            print(f"    peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)
    return out


def save(options, results: dict[str, float]) -> None:
    """Write what is known so far, where it was asked for."""
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=("tiny", "cosmos-predict2-2b"))
    parser.add_argument("--layers", type=int, default=0, help="blocks; 0 takes the preset's")
    parser.add_argument("--batch", type=lambda s: [int(x) for x in s.split(",")], default=[1, 4, 8, 16])
    parser.add_argument("--frames", type=lambda s: [int(x) for x in s.split(",")], default=[9, 11])
    parser.add_argument("--variants", type=lambda s: s.split(","), default=["compiled", "graphs", "fp8"],
                        help="beside eager, as far as the device has them; '' for none")
    parser.add_argument("--seconds", type=float, default=0.3, help="that one timing of one variant takes")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--train", action="store_true", help="time training steps instead")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    config = ModelConfig(preset=options.preset, layers=options.layers or None)
    spec = make_spec(config, CAMERAS[options.frames[0]], 7, 9)
    net = Transformer(spec.transformer).to(device, dtype).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, p.shape[1] ** -0.5) if p.ndim == 2 else p.normal_(1, 0.1)
    tokens = 8 * options.frames[0] * (spec.frame_shape[1] // spec.transformer.patch) ** 2
    with torch.no_grad():
        top, shape = ceiling(device, dtype, spec.transformer, tokens, max(options.seconds, 0.3))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{options.preset}: {sum(p.numel() for p in net.parameters()):,} parameters, {str(dtype).removeprefix('torch.')}, {name}, "
          f"torch {torch.__version__}; matmul ceiling {top:.3f} TFLOP/s at {shape}", flush=True)
    if options.train:
        results = bench_training(options, spec, net, device, dtype, top)
    else:
        net.requires_grad_(False)
        with torch.no_grad():
            results = bench_inference(options, spec, net, device, dtype, top)
    save(options, results)


if __name__ == "__main__":
    main()
