"""``make bench-gpu`` at small size: every part runs, so that the first minute on a GPU is not spent on typos."""

from __future__ import annotations

import json
import os

import pytest

from cosmos_ray.commands.cli import make_parser
from cosmos_ray.commands.configure import configure
from cosmos_ray.config import check
from jobs.bench import gpu
from jobs.bench.gpu import FIGURES, PARTS, Part
from jobs.bench.gpu_parts import Bench, turn_flags
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


QUICK = tuple(part.name for part in PARTS if part.name != "turn")


@pytest.mark.parametrize("parts", [QUICK, pytest.param(("turn",), marks=pytest.mark.slow)], ids=["all but the turn", "turn"])
def test_every_part_runs_at_small_size_and_gives_every_figure(tmp_path, parts):
    file, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    assert gpu.main(arguments=["--small", "--parts", ",".join(parts), "--json", str(file), "--page", str(page)]) == 0
    results = json.loads(file.read_text())
    of_the_turn = {"turn_s", "turn_peak_gb"}
    wanted = of_the_turn if parts == ("turn",) else FIGURES.keys() - of_the_turn - {"compiled_vs_eager_b1"}  # which takes minutes here
    assert results.keys() == wanted and all(value >= 0 for value in results.values())
    text = page.read_text()
    assert text.count("not measured") == len(FIGURES) - len(wanted) and text.count("\n|") == len(FIGURES) + 2


@pytest.mark.parametrize("small", [True, False])
def test_the_flags_of_the_turn_are_settings_that_go_together(tmp_path, monkeypatch, small):
    bench = Bench(True, None, tmp_path)
    files = bench.files()
    bench.small = small
    monkeypatch.setattr(bench, "files", lambda: files)
    config = configure(make_parser().parse_args(["demo", *turn_flags(bench)]))
    check(config)
    assert config.rollouts == 4 and config.refine_steps == 5 and config.model.preset == "cosmos-predict2-2b"
    assert (config.inference.gpus > 0) == (not small)


def test_a_part_that_overruns_or_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    writes = "import json, sys, time\nopen(sys.argv[-1], 'w').write(json.dumps({%r: 1.0}))\n"
    (tmp_path / "slow.py").write_text(writes % "turn_s" + "time.sleep(600)\n")
    (tmp_path / "wrong.py").write_text("raise SystemExit('the GPU is on fire')\n")
    (tmp_path / "good.py").write_text(writes % "vae_encode_ms")
    parts = tuple(Part(name, limit, (f"{name}.py",), (f"{name}.py",)) for name, limit in (("slow", 0.5), ("wrong", 30), ("good", 30)))
    file = tmp_path / "gpu.json"
    assert gpu.main(parts, ["--small", "--json", str(file)]) == 1
    assert json.loads(file.read_text()) == {"turn_s": 1.0, "vae_encode_ms": 1.0}  # what was measured before the end is kept
    said = capsys.readouterr().out
    assert "slow: not done within 2 s" in said and "wrong: exit code 1: the GPU is on fire" in said and "good: done" in said


def test_the_limits_of_all_parts_are_nine_minutes():
    assert sum(part.limit_s for part in PARTS) <= 9 * 60


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert gpu.main(arguments=[]) == 2 and "--small" in capsys.readouterr().out


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments=["--small", "--parts", "planing"])
    assert "there is no part 'planing'" in capsys.readouterr().err
