"""Text embeddings of a whole store: `pretrain` on official demonstrations with the official pickle, and `replay embed`."""

import pickle
import re

import pytest
import torch

from cosmos_ray.commands.cli import main
from cosmos_ray.config.settings import changed
from cosmos_ray.errors import ConfigError
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings
from cosmos_ray.run import open_run
from cosmos_ray.stages.training import complete_initial_policy, make_initial_policy
from cosmos_ray.use import Use
from tests import test_command_line, test_exchange_command
from tests.test_data_run import importing, line_of, run, settings_of
from tests.test_exchange_command import embedding, settings
from tests.test_exchange_command import importing as importing_weights
from tests.test_replay_exchange import write_libero

handlers = test_command_line.handlers  # the fixture that puts the signal handler back
files = test_exchange_command.files  # a small release: weights, statistics, VAE

OPEN, CLOSE = "open the drawer", "close the drawer"


def pickled(path, *instructions: str):
    """As the released ``*_t5_embeddings.pkl``: {instruction: (1, 512, 1024) bfloat16}."""
    with open(path, "wb") as file:
        pickle.dump({text: embedding(number) for number, text in enumerate(instructions)}, file)
    return path


def demonstrations(files, root, text_path, name: str = "lift") -> None:
    """Two files of LIBERO, each with an instruction of its own, in a run of the small 2B preset."""
    flags = settings(files, root, name=name, model__text_path=str(text_path), model__image_size="32", sim__image_size="32")
    flags = [flag for i, flag in enumerate(flags) if flags[max(0, i - 1)] not in ("--root", "--name") and flag not in ("--root", "--name")]
    for text in (OPEN, CLOSE):
        path = root / f"{text.replace(' ', '_')}_demo.hdf5"
        write_libero(path, steps=20)
        assert main(importing(root, path, name=name, flags=["--instruction", text, *flags])) == 0


def run_of(root, name: str = "lift"):
    return open_run(settings_of(root, name), Use(needs_ray=False), quiet=True)


def test_the_official_pickle_serves_official_demonstrations(files, tmp_path, handlers):
    """Every instruction of the store goes into the checkpoint, and the simulated task's, which the pickle lacks, is not asked for."""
    demonstrations(files, tmp_path, pickled(tmp_path / "t5.pkl", OPEN, CLOSE, "fold the shirt"))
    with run_of(tmp_path) as opened:
        make_initial_policy(opened)
        known = read_text_embeddings(opened.folder.checkpoint("initial") / "text.safetensors")
    assert torch.equal(known[CLOSE], embedding(1)[0]) and torch.equal(known[OPEN], embedding(0)[0])


@pytest.mark.slow
def test_pretrain_on_official_demonstrations_with_the_official_pickle(files, tmp_path, handlers):
    demonstrations(files, tmp_path, pickled(tmp_path / "t5.pkl", OPEN, CLOSE))
    assert "base policy after 2 steps" in run(tmp_path, "pretrain", "--pretrain-steps", "2", "--learner.batch-size", "2")


def test_a_missing_instruction_is_named_before_training(files, tmp_path, handlers, capfd):
    demonstrations(files, tmp_path, pickled(tmp_path / "t5.pkl", OPEN))
    with run_of(tmp_path) as opened, pytest.raises(ConfigError) as caught:
        make_initial_policy(opened)
    line = str(caught.value)
    assert f"t5.pkl has no embedding of 1 of the 2 instructions of the demonstrations, such as '{CLOSE}'" in line and "\n" not in line
    assert "replay embed --name lift --t5 FOLDER --to FILE" in line
    # The advice works: other embeddings may be given until the policy is made.
    more = pickled(tmp_path / "more.pkl", OPEN, CLOSE)
    refine = ["refine", "--root", str(tmp_path), "--name", "lift", "--refine-rollouts", "0", "--model.text-path", str(more)]
    assert "there is no base policy" in line_of(capfd, refine)
    with run_of(tmp_path) as opened:
        make_initial_policy(opened)
        assert len(read_text_embeddings(opened.folder.checkpoint("initial") / "text.safetensors")) == 2


def test_an_imported_policy_is_given_the_texts_of_the_demonstrations(files, tmp_path, handlers):
    """Its checkpoint has those that came with it; `pretrain` adds those of the store, from wherever they are given now."""
    assert main(importing_weights(files, tmp_path, model__text_path=str(pickled(tmp_path / "one.pkl", OPEN)))) == 0
    for text in (OPEN, CLOSE):
        path = tmp_path / f"{text.replace(' ', '_')}_demo.hdf5"
        write_libero(path, steps=20)
        assert main(importing(tmp_path, path, name="lib", flags=["--instruction", text])) == 0
    complaint = f"1 of the 2 instructions of the demonstrations, such as '{CLOSE}'"
    with run_of(tmp_path, "lib") as opened, pytest.raises(ConfigError, match=complaint):
        complete_initial_policy(opened)
    config = changed(settings_of(tmp_path, "lib"), {"model.text_path": str(pickled(tmp_path / "two.pkl", "fold the shirt", CLOSE))})
    with open_run(config, Use(needs_ray=False), quiet=True) as opened:
        complete_initial_policy(opened)
        known = read_text_embeddings(opened.folder.checkpoint("initial") / "text.safetensors")
        assert torch.equal(known[OPEN], embedding(0)[0]) and torch.equal(known[CLOSE], embedding(1)[0])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A T5 encoder of the real class with random weights, of the released width."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "open": 3, "close": 4, "the": 5, "drawer": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=9, d_model=1024, d_kv=8, d_ff=32, num_layers=1, num_heads=4)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "pkl"])
def test_every_instruction_of_a_store_is_embedded_in_one_command(files, tmp_path, handlers, capfd, encoder, suffix):
    demonstrations(files, tmp_path, pickled(tmp_path / "none.pkl", "fold the shirt"))
    target = tmp_path / f"texts.{suffix}"
    embed = ["replay", "embed", "--root", str(tmp_path), "--name", "lift", "--t5", str(encoder), "--to", str(target), "--quiet"]
    capfd.readouterr()
    assert main(embed) == 0
    assert capfd.readouterr().out == f"{target} has the embeddings of 2 instructions, 2 of them new: give it as --model.text-path\n"
    known = read_text_embeddings(target)
    assert set(known) == {OPEN, CLOSE} and all(rows.shape == (512, 1024) and rows.dtype == torch.bfloat16 for rows in known.values())
    assert known[OPEN][:4].any() and not known[OPEN][4:].any() and not torch.equal(known[OPEN], known[CLOSE])  # three words and the end
    if suffix == "pkl":  # as the public code reads it
        with open(target, "rb") as file:
            theirs = pickle.load(file)
        assert {text: tuple(rows.shape) for text, rows in theirs.items()} == {OPEN: (1, 512, 1024), CLOSE: (1, 512, 1024)}
    stamp = target.stat().st_mtime_ns
    assert main(embed) == 0 and "0 of them new" in capfd.readouterr().out and target.stat().st_mtime_ns == stamp  # resumed: nothing to do


@pytest.mark.parametrize("flags, complaint", [
    (["--to", "texts.json"], r"--to .*texts\.json must end in \.safetensors, or in \.pkl"),
    (["--t5", "nowhere"], "there is no T5 folder .*nowhere: give the folder that holds config.json"),
])  # fmt: skip
def test_what_cannot_be_embedded_is_one_line(tmp_path, monkeypatch, handlers, capfd, flags, complaint):
    monkeypatch.chdir(tmp_path)
    write_libero(tmp_path / "open_the_drawer_demo.hdf5")
    assert main(importing(tmp_path, tmp_path / "open_the_drawer_demo.hdf5")) == 0
    given = ["--t5", str(tmp_path), "--to", "texts.safetensors", *flags]
    line = line_of(capfd, ["replay", "embed", "--root", str(tmp_path), "--name", "lift", "--quiet", *given])
    assert re.search(complaint, line)
