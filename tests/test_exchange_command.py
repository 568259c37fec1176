"""`import` and `export` as a user types them: what comes in goes out bit for bit, and one line for whatever is wrong."""

import json
import pickle
import re
import shutil
import signal

import numpy as np
import pytest
import torch

from cosmos_ray.commands.cli import main
from cosmos_ray.config import ModelConfig
from cosmos_ray.model.checkpoint import load_checkpoint, read_description
from cosmos_ray.model.exchange import read_weights
from cosmos_ray.model.exchange.statistics import read_statistics
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.transformer import Transformer
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.sim import tasks
from tests import test_command_line
from tests.conftest import metrics, run_command
from tests.test_exchange import PATHS, same

handlers = test_command_line.handlers  # the fixture that puts the signal handler back

LIFT = tasks.spec("Lift").instruction
ALOHA = {"actions_min": [-1] * 14, "actions_max": [1] * 14, "proprio_min": [-2] * 14, "proprio_max": [1] * 14}


def embedding(seed: int, words: int = 6) -> torch.Tensor:
    """As in the released files: (1, 512, 1024), zero past the prompt."""
    rows = torch.zeros(1, 512, 1024, dtype=torch.bfloat16)
    rows[0, :words] = torch.randn(words, 1024, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a release holds, small: the policy's .pt, statistics, T5 embeddings, and a Wan VAE beside them."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1).save_pretrained(folder / "wan")
    spec = make_spec(ModelConfig(preset="cosmos-predict2-2b", width=64, heads=2, layers=2, image_size=64), ("a", "b"), 7, 9)
    net, generator = Transformer(spec.transformer), torch.Generator().manual_seed(1)
    net.initialize(generator)
    state = {f"net.{k}": (v + 0.02 * torch.randn(v.shape, generator=generator)).bfloat16() for k, v in net.state_dict().items()}
    torch.save({"model": state | {"net.accum_iteration": torch.tensor(3)}}, folder / "policy.pt")
    (folder / "statistics.json").write_text(json.dumps({
        "actions_min": [-1, -1, -1, -0.25, -0.25, -0.25, -1], "actions_max": [1, 1, 1, 0.25, 0.25, 0.25, 1],
        "proprio_min": [-1.5] * 8 + [0.5], "proprio_max": [1.5] * 8 + [0.5], "actions_mean": [0.125] * 7, "num_transitions": 52970}))
    (folder / "aloha.json").write_text(json.dumps(ALOHA))
    (folder / "half.json").write_text(json.dumps({k: v for k, v in ALOHA.items() if k != "proprio_max"}))
    with open(folder / "t5.pkl", "wb") as file:
        pickle.dump({LIFT: embedding(0), "fold the shirt": embedding(1)}, file)
    with open(folder / "other.pkl", "wb") as file:
        pickle.dump({"fold the shirt": embedding(1)}, file)
    return folder


def settings(files, root, **changes: str) -> list[str]:
    """Flags of a small imported run; ``changes`` such as ``model__layers="3"``."""
    chosen = {"root": str(root), "name": "lib", "model.image-size": "64", "sim.image-size": "64", "sim.horizon": "40",
              "model.preset": "cosmos-predict2-2b",
              "model.suite": "libero", "model.width": "64", "model.heads": "2", "model.layers": "2", "learner.batch-size": "4",
              "model.tokenizer-path": str(files / "wan"), "model.text-path": str(files / "t5.pkl"),
              **{k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}}
    return [part for name, value in chosen.items() for part in ("--" + name, value)]


def importing(files, root, weights="policy.pt", statistics="statistics.json", **changes: str) -> list[str]:
    return ["import", *settings(files, root, **changes), "--weights", str(files / weights), "--statistics", str(files / statistics)]


def export(root, to, format: str, *more: str) -> list[str]:
    return ["export", "--root", str(root), "--name", "lib", "--checkpoint", "base", "--format", format, "--to", str(to), *more]


@pytest.fixture(scope="module")
def imported(files, tmp_path_factory):
    """The root of an imported run, not to be changed."""
    before = signal.getsignal(signal.SIGTERM)
    root = tmp_path_factory.mktemp("imported")
    try:
        assert main(importing(files, root)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return root


@pytest.fixture
def root(imported, tmp_path):
    """A private copy of the imported run."""
    shutil.copytree(imported / "lib", tmp_path / "lib")
    return tmp_path


def fails(arguments: list[str], code: int, complaint: str, capfd) -> None:
    """The command leaves with ``code`` and one line on stderr that matches, and says nothing else."""
    capfd.readouterr()
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert re.search(complaint, err), err


# ---------------------------------------------------------------- import


def test_an_import_is_the_base_policy_to_the_bit(files, imported):
    folder = imported / "lib" / "checkpoints"
    policy, version = load_checkpoint(folder / "base", dtype=None)
    weights = read_weights(files / "policy.pt")
    assert same(policy.net.state_dict(), weights) and {v.dtype for v in weights.values()} == {torch.bfloat16}
    ranges = read_statistics(files / "statistics.json")
    assert np.array_equal(policy.action_low, ranges.actions_low) and np.array_equal(policy.proprio_high, ranges.proprio_high)
    assert set(policy.text.embeddings) == {LIFT, "fold the shirt"} and torch.equal(policy.text(LIFT), embedding(0)[0])
    spec, _, info = read_description(folder / "base")
    assert version == 1 and (spec.chunk, spec.jpeg, spec.augmented, spec.image_size) == (16, True, True, 64)
    assert info["stage"] == "import" and info["step"] == 0 and info["statistics"]["num_transitions"] == 52970
    for file in folder.joinpath("base").iterdir():
        assert (folder / "initial" / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["base", "initial"]


def test_an_import_reports_size_and_constant_dimensions(files, tmp_path, capfd, handlers):
    assert main(importing(files, tmp_path)) == 0
    out, err = capfd.readouterr()
    count = sum(v.numel() for v in read_weights(files / "policy.pt").values())
    assert err == "" and len(out.splitlines()) == 1
    assert f"{count:,} parameters" in out and "constant, so always 0 to the network: proprio[8]" in out
    policy, _ = load_checkpoint(tmp_path / "lib" / "checkpoints" / "base")
    state = policy.proprio_scale.normalize(torch.full((1, 9), 0.7))
    assert state[0, 8] == 0 and torch.isfinite(state).all()  # the public code divides by zero there


def test_a_later_command_keeps_the_run_s_settings(root, handlers):
    before = json.loads((root / "lib" / "config.json").read_text())
    assert main(export(root, root / "out.pt", "pt")) == 0
    after = json.loads((root / "lib" / "config.json").read_text())
    assert after == before | {"root": str(root)}
    assert (after["sim"]["image_size"], after["learner"]["batch_size"], after["learner"]["schedule"]) == (64, 4, "paper")


def test_an_import_from_a_t5_folder_embeds_the_task_once_for_every_actor(files, tmp_path, handlers):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path / "t5"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *LIFT.split()])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    T5EncoderModel(T5Config(vocab_size=9, d_model=1024, d_kv=8, d_ff=32, num_layers=1, num_heads=4)).save_pretrained(folder)
    assert main(importing(files, tmp_path, model__text_path=str(folder))) == 0
    shutil.rmtree(folder)
    for name in ("base", "initial"):
        policy, _ = load_checkpoint(tmp_path / "lib" / "checkpoints" / name)
        assert set(policy.text.embeddings) == {LIFT} and policy.text(LIFT)[: len(LIFT.split())].any()


def test_a_run_is_used_from_another_folder_than_it_was_made_in(files, tmp_path, handlers, monkeypatch):
    monkeypatch.chdir(files)
    assert main(importing(files, tmp_path, model__tokenizer_path="wan", model__text_path="t5.pkl")) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--root", ".", "--name", "lib", "--to", "out.pt"]) == 0  # of the newest policy there is
    assert same(read_weights(tmp_path / "out.pt"), read_weights(files / "policy.pt"))


@pytest.mark.parametrize("changes, code, complaint", [
    ({"statistics": "nothing.json"}, 2, "cannot read the dataset statistics .*nothing.json: No such file"),
    ({"statistics": "half.json"}, 2, "half.json: proprio_max is missing"),
    ({"statistics": "aloha.json"}, 2, r"aloha.json describes 14 numbers per action and 14 of proprioception, suite 'libero' has 7 and 9: "
                                        "give"),
    ({"weights": "nothing.pt"}, 2, "there is no .*nothing.pt: give a .pt, .pth or .ckpt file"),
    ({"weights": "statistics.json"}, 2, "no weights in .*statistics.json: give a .pt, .pth or .ckpt file"),
    ({"model__layers": "3"}, 2, r"policy.pt: key blocks\.2\..* is missing.*choose weights of this model"),
    ({"model__width": "128"}, 2, r"policy.pt: .*has shape \(.*set the model's dimensions to those"),
    ({"sim__third_cameras": "agentview,frontview"}, 2, "'libero' sees 1 wrist and 1 third-person cameras, the simulation has 1 and 2"),
    ({"model__suite": "robocasa", "sim__task": "Lift", "sim__third_cameras": "agentview"}, 2,
     "'robocasa' sees 1 wrist and 2 third-person cameras, the simulation has 1 and 1: name"),
    ({"model__tokenizer_path": "nowhere"}, 2, "needs model.tokenizer_path, and '.*nowhere' does not exist"),
    ({"model__text_path": ""}, 2, "needs model.text_path"),
], ids=lambda value: "" if not isinstance(value, dict) else " ".join(map(" ".join, value.items())))  # fmt: skip
def test_what_cannot_be_imported_is_one_line(files, tmp_path, capfd, handlers, changes, code, complaint):
    fails(importing(files, tmp_path, **changes), code, complaint, capfd)
    assert not (tmp_path / "lib").exists()  # nothing half done, and no run that keeps the wrong settings
    assert main([*importing(files, tmp_path), "--fresh"]) == 0


def test_an_import_that_names_no_statistics_says_so(files, tmp_path, capfd, handlers):
    fails(["import", *settings(files, tmp_path), "--weights", str(files / "policy.pt")], 2, "required: --statistics", capfd)


def test_a_second_import_is_refused_and_leaves_the_first(files, root, capfd, handlers):
    before = (root / "lib" / "checkpoints" / "base" / "policy.json").read_bytes()
    complaint = "run 'lib' has a base policy already: give another --name, or --fresh"
    fails(importing(files, root), 2, complaint, capfd)
    assert (root / "lib" / "checkpoints" / "base" / "policy.json").read_bytes() == before
    shutil.rmtree(root / "lib" / "checkpoints" / "base")
    (root / "lib" / "learner" / "base").mkdir(parents=True)  # a `pretrain` that was interrupted: it would go on from its own state
    fails(importing(files, root), 2, complaint, capfd)


def test_an_interrupted_import_leaves_no_base_and_is_repeated(files, tmp_path, capfd, handlers, monkeypatch):
    """Base appears last and whole: `pretrain` on a base without the policy it came from would start from random weights."""
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    checkpoints = tmp_path / "lib" / "checkpoints"
    with monkeypatch.context() as context:
        context.setattr("cosmos_ray.model.checkpoint.shutil.copytree", interrupt)
        fails(importing(files, tmp_path), 130, "interrupted; the same command continues", capfd)
    assert not (checkpoints / "base").exists()
    assert main(importing(files, tmp_path)) == 0
    for name in ("base", "initial"):
        assert same(load_checkpoint(checkpoints / name, dtype=None)[0].net.state_dict(), read_weights(files / "policy.pt"))


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("format", PATHS)
def test_what_was_imported_is_exported_to_the_bit(files, root, capfd, handlers, format):
    to = root / PATHS[format]
    assert main(export(root, to, format)) == 0
    statistics, texts = root / f"{to.stem}_dataset_statistics.json", root / f"{to.stem}_t5_embeddings.safetensors"
    assert capfd.readouterr().out == f"wrote {to} and {statistics} and {texts}\n"
    assert same(read_weights(to), read_weights(files / "policy.pt"))
    assert json.loads(statistics.read_text()) == json.loads((files / "statistics.json").read_text())
    assert same(read_text_embeddings(texts), read_text_embeddings(files / "t5.pkl"))


def test_an_exported_policy_is_imported_again(files, root, handlers):
    assert main(export(root, root / "out.safetensors", "safetensors")) == 0
    again = importing(files, root, name="again", weights=root / "out.safetensors", statistics=root / "out_dataset_statistics.json",
                      model__text_path=str(root / "out_t5_embeddings.safetensors"))
    assert main(again) == 0
    policies = [load_checkpoint(root / name / "checkpoints" / "base", dtype=None)[0] for name in ("lib", "again")]
    assert same(*(policy.state_dict() for policy in policies))


@pytest.mark.parametrize("there", ["out.pt", "out_dataset_statistics.json", "out_t5_embeddings.safetensors"])
def test_an_export_replaces_nothing_unasked(root, capfd, handlers, there):
    (root / there).write_text("mine")
    fails(export(root, root / "out.pt", "pt"), 1 if there == "out.pt" else 2, f"{there} exists: .*overwrit", capfd)
    assert [p.name for p in root.glob("out*")] == [there] and (root / there).read_text() == "mine"
    assert main(export(root, root / "out.pt", "pt", "--overwrite")) == 0
    assert read_weights(root / "out.pt") and read_statistics(root / "out_dataset_statistics.json")


@pytest.mark.parametrize("arguments, code, complaint", [
    (["--to", "x.bin"], 1, r"need a name that ends in \.pt or \.pth: rename x\.bin"),
    (["--to", "x.pt", "--checkpoint", "refined"], 1, "no checkpoint in .*refined"),
    (["--to", "x.pt", "--format", "onnx"], 2, "invalid choice: 'onnx'"),
    (["--to", "x.pt", "--name", "nobody"], 2, "there is no run 'nobody'"),
    ([], 2, "required: --to"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_cannot_be_exported_is_one_line(imported, tmp_path, monkeypatch, capfd, handlers, arguments, code, complaint):
    monkeypatch.chdir(tmp_path)
    fails(["export", "--root", str(imported), "--name", "lib", "--checkpoint", "base", *arguments], code, complaint, capfd)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- acting


def test_an_imported_policy_that_does_not_know_the_instruction_is_refused(files, tmp_path, handlers):
    assert main(importing(files, tmp_path, model__text_path=str(files / "other.pkl"))) == 0
    done = run_command("rollout", tmp_path, "--learner.batch-size", "4", "--quiet", name="lib", code=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"no text embedding of {LIFT!r}, only of 1, such as 'fold the shirt'" in done.stderr
    assert "import or pretrain it with a T5 directory as model.text_path" in done.stderr


@pytest.mark.slow
def test_an_imported_policy_acts_is_refined_and_goes_back_to_its_format(files, root):
    flags = ["--quiet", "--learner.batch-size", "4", "--rollouts", "2", "--demos", "3", "--refine-steps", "6", "--refine-rollouts", "2",
             "--publish-every", "3", "--learner.refine-warmup", "2", "--learner.refine-cycle", "4", "--learner.lora-rank", "4"]
    for stage, said in (("rollout", "2 rollouts"), ("collect", "3 demonstrations"), ("refine", "after 6 steps")):
        assert said in run_command(stage, root, *flags, name="lib").stdout
    store = ReplayStore(root / "lib" / "replay", create=False)
    store.refresh()
    assert [s.episode_class for s in store.summaries()].count("demo") == 3
    run = json.loads((root / "lib" / "identity.json").read_text())["key"]
    assert len([s for s in store.summaries() if s.episode_class != "demo" and s.key.run == run]) == 2 + 2  # besides those of the expert
    rates = [row["lr"] / 1e-4 for row in metrics(root / "lib", "refine")]
    whole = [1e-6, 0.5, 1.0, 0.65, 0.30, 0.06]  # warm-up of 2 steps, cycle of 4
    assert sum(rates) / len(rates) == pytest.approx(sum(whole) / 6, rel=1e-3)
    assert list((root / "lib" / "latents").glob("*/*.arrow"))
    assert main(["export", "--root", str(root), "--name", "lib", "--to", str(root / "refined.pt")]) == 0
    theirs, ours = read_weights(files / "policy.pt"), read_weights(root / "refined.pt")
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    changed = {k for k in ours if not torch.equal(ours[k], theirs[k])}
    assert changed and all(".self_attn." in k or ".cross_attn." in k or ".mlp." in k for k in changed)
    assert read_statistics(root / "refined_dataset_statistics.json").raw == json.loads((files / "statistics.json").read_text())
