"""Weights as folders: torch.distributed.checkpoint and diffusers."""

import io
import pickle
import shutil

import torch
import torch.distributed.checkpoint as dcp

from cosmos_ray.model.exchange import read_weights
from cosmos_ray.model.exchange.dcp import read_dcp, write_dcp
from cosmos_ray.model.exchange.diffusers_folder import read_diffusers, write_diffusers
from cosmos_ray.model.exchange.names import from_diffusers
from tests.test_exchange import CONFIG, public, refused, same, weights

# ---------------------------------------------------------------- DCP


def test_a_training_folder_is_read_through_its_model_folder(tmp_path):
    """As the public trainer saves it: objects beside tensors, the average beside the network, other folders beside the model's."""
    folder = tmp_path / "iter_000000100"
    state = {**public(weights(torch.bfloat16)), **public({k: v + 1 for k, v in weights().items()}, "net_ema."),
             "net.blocks.0.self_attn._extra_state": io.BytesIO(b"state"), "net.accum_iteration": torch.tensor(3), "note": "text"}
    dcp.save(state, checkpoint_id=folder / "model", no_dist=True)
    dcp.save({"step": torch.tensor(3)}, checkpoint_id=folder / "optim", no_dist=True)
    assert same(read_weights(folder), weights(torch.bfloat16)) and same(read_weights(folder / "model"), weights(torch.bfloat16))


def save_sharded(rank: int, folder: str, sync: str) -> None:
    """One of two ranks that save the network sharded along the first dimension, as FSDP does."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{sync}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state = public({**weights(), "odd": torch.arange(3.0), "one": torch.ones(1, 5)})
    dcp.save({k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in state.items()}, checkpoint_id=folder)
    torch.distributed.destroy_process_group()


def test_a_folder_of_two_ranks_is_put_together(tmp_path):
    torch.multiprocessing.spawn(save_sharded, (str(tmp_path / "w"), str(tmp_path / "sync")), nprocs=2)
    assert len(list((tmp_path / "w").glob("*.distcp"))) == 2
    assert same(read_dcp(tmp_path / "w"), {**weights(), "odd": torch.arange(3.0), "one": torch.ones(1, 5)})
    (tmp_path / "w" / "__1_0.distcp").unlink()
    with refused("shard __1_0.distcp is missing: copy the whole folder"):
        read_dcp(tmp_path / "w")


def test_torch_s_own_loader_reads_our_dcp_folder(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    state = {k: torch.zeros_like(v) for k, v in public(weights()).items()}
    dcp.load(state, checkpoint_id=tmp_path / "w", no_dist=True)
    assert same(state, public(weights()))
    assert str(tmp_path).encode() not in (tmp_path / "w" / ".metadata").read_bytes()


def test_a_missing_or_truncated_shard_is_refused(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    shard = tmp_path / "w" / "__0_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with refused(rf"shard __0_0.distcp is truncated, {len(data) // 2} bytes of at least"):
        read_weights(tmp_path / "w")
    shard.write_bytes(bytes(len(data)))
    with refused(r"w: a shard is damaged \(.*\): copy the folder again"):
        read_weights(tmp_path / "w")
    shard.unlink()
    with refused("shard __0_0.distcp is missing"):
        read_weights(tmp_path / "w")


def test_an_unfinished_dcp_folder_is_refused(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    (tmp_path / "w" / ".metadata").unlink()
    with refused("has shards but no .metadata: the save did not finish"):
        read_weights(tmp_path / "w")


def test_shards_that_do_not_cover_a_tensor_are_refused(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    file = tmp_path / "w" / ".metadata"
    record = pickle.loads(file.read_bytes())
    item = record.state_dict_metadata["net.blocks.0.mlp.layer1.weight"]
    item.size = torch.Size((512, 64))
    file.write_bytes(pickle.dumps(record))
    with refused("the shards do not cover key net.blocks.0.mlp.layer1.weight exactly"):
        read_dcp(tmp_path / "w")


# ---------------------------------------------------------------- diffusers


def test_diffusers_loads_our_folder_and_we_read_theirs_sharded(tmp_path, monkeypatch):
    from diffusers import CosmosTransformer3DModel

    ours = weights(torch.bfloat16)
    # Names a part that Predict2 does not have, and for its sake loading insists on the package accelerate.
    monkeypatch.setattr(CosmosTransformer3DModel, "_keep_in_fp32_modules", None)
    write_diffusers(ours, tmp_path / "ours", CONFIG)
    theirs, info = CosmosTransformer3DModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    assert same({from_diffusers(k): v for k, v in theirs.state_dict().items()}, ours)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="200KB")
    folder = tmp_path / "pipeline" / "transformer"
    assert len(list(folder.glob("*.safetensors"))) > 1
    tensors, config = read_diffusers(tmp_path / "pipeline")
    assert same(tensors, ours) and {k: config[k] for k in CONFIG} == CONFIG
    next(folder.glob("*00002*.safetensors")).unlink()
    with refused("transformer: shard .*00002.*safetensors is missing"):
        read_weights(tmp_path / "pipeline")


def test_a_config_for_other_dimensions_is_refused(tmp_path):
    with refused(r"key blocks.0.adaln_modulation_cross_attn.1.weight has shape \(16, 64\), the model's is \(256, 64\)"):
        write_diffusers(weights(), tmp_path / "w", {**CONFIG, "adaln_lora_dim": 256})
    with refused("key blocks.2.* is missing"):
        write_diffusers(weights(), tmp_path / "w", {**CONFIG, "num_layers": 3})
    with refused("config for diffusers is incomplete"):
        write_diffusers(weights(), tmp_path / "w", {"num_layers": 2})
    assert not list(tmp_path.iterdir())


def test_a_diffusers_folder_that_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "w"
    write_diffusers(weights(), folder, CONFIG)
    file = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, folder / "diffusion_pytorch_model.fp16.safetensors")
    with refused("has diffusion_pytorch_model.fp16.safetensors and diffusion_pytorch_model.safetensors but no"):
        read_weights(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("[]")
    with refused("holds a list instead of settings"):
        read_weights(folder)
    index.write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with refused("outside of its folder: refused"):
        read_weights(folder)
    index.unlink()
    for part in folder.glob("*.safetensors"):
        part.unlink()
    with refused("has no diffusion_pytorch_model.safetensors: copy the whole folder"):
        read_weights(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with refused(r"only as \.bin, which is pickled code"):
        read_weights(folder)
    (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with refused("is of a WanTransformer3DModel, not of a CosmosTransformer3DModel"):
        read_weights(folder)
    (folder / "config.json").write_text("{")
    with refused("config.json is no JSON"):
        read_weights(folder)
