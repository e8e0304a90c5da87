"""Reading a checkpoint without its run: the weights of one rank out of files of several, and what is wrong with them.

The files are made here in DeepSpeed's form; that it is DeepSpeed's form, test_resume.py checks with real runs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from megatron_ext.checkpoint.store import write_manifest
from megatron_ext.checkpoint.weights import find_checkpoint, open_checkpoint
from megatron_ext.errors import UserError
from tests.checkpoint.test_store import manifest_of

LAYER = "decoder.layers.0"
SPLIT = {
    "embedding.word_embeddings.weight": 0,
    "embedding.position_embeddings.weight": None,
    f"{LAYER}.input_layernorm.weight": None,
    f"{LAYER}.self_attention.linear_qkv.weight": 0,
    f"{LAYER}.self_attention.linear_qkv.bias": 0,
    f"{LAYER}.self_attention.linear_proj.weight": 1,
    f"{LAYER}.self_attention.linear_proj.bias": None,
    f"{LAYER}.mlp.linear_fc1.weight": 0,
    f"{LAYER}.mlp.linear_fc1.bias": 0,
    f"{LAYER}.mlp.linear_fc2.weight": 1,
    f"{LAYER}.mlp.linear_fc2.bias": None,
    "output_layer.weight": 0,
}


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        # Neither 6 * 10 nor 10 is a multiple of 4: ZeRO 3 pads.
        name: torch.randn((10,) if name.endswith("bias") or "norm" in name else (6, 10), generator=generator)
        for name in SPLIT
    }


def _slice(weights: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    return {
        name: weight if (dim := SPLIT[name]) is None else weight.chunk(size, dim=dim)[rank].clone()
        for name, weight in weights.items()
    }


def _write(folder: Path, *, tensor: int, data: int, zero: int) -> Path:
    """A checkpoint of ``_weights`` as DeepSpeed writes it; returns its directory."""
    checkpoint = folder / "run" / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    layout = {"world_size": tensor * data, "tensor": tensor, "zero_stage": zero}
    write_manifest(checkpoint, manifest_of(layout=layout, config={"model": {}}))
    for rank in range(tensor):
        part = _slice(_weights(), rank, tensor)
        if zero < 3:
            torch.save(
                {"module": part, "others": ZeroStageEnum.weights}, checkpoint / f"mp_rank_{rank:02d}_model_states.pt"
            )
            continue
        # Every data rank holds an equal run of each flat parameter, the last ones padded.
        flats = [torch.nn.functional.pad(w.flatten(), (0, -w.numel() % data)).chunk(data) for w in part.values()]
        for place in range(data):
            prefix = f"zero_pp_rank_{place}_mp_rank_{rank:02d}"
            shapes = [{name: weight.shape for name, weight in part.items()}]
            state: dict[str, Any] = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}}
            torch.save(state | {"ds_version": "0"}, checkpoint / f"{prefix}_model_states.pt")
            optimizer = {
                "zero_stage": 3,
                "partition_count": data,
                "fp32_flat_groups": [torch.cat([flat[place] for flat in flats])],
            }
            torch.save({"optimizer_state_dict": optimizer}, checkpoint / f"{prefix}_optim_states.pt")
    return checkpoint


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_weights_are_those_of_one_rank(tmp_path: Path, tensor: int, data: int, zero: int) -> None:
    checkpoint = _write(tmp_path, tensor=tensor, data=data, zero=zero)
    found = open_checkpoint(tmp_path / "run").weights()
    assert found.keys() == SPLIT.keys()
    for name, weight in _weights().items():
        assert torch.equal(found[name], weight), name
    assert open_checkpoint(checkpoint).path == checkpoint


@pytest.mark.parametrize(("zero", "kind"), [(1, "model"), (3, "model"), (3, "optim")])
@pytest.mark.parametrize("size", [None, 0, 500])
def test_missing_and_damaged_files_are_named(tmp_path: Path, zero: int, size: int | None, kind: str) -> None:
    checkpoint = _write(tmp_path, tensor=2, data=2, zero=zero)
    paths = sorted(checkpoint.glob(f"*mp_rank_01_{kind}_states.pt"))
    assert len(paths) == (1 if zero == 1 else 2)
    for path in paths if size is None else paths[-1:]:
        path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"step_3 cannot be read .*; use another checkpoint of the run"):
        open_checkpoint(checkpoint).weights()


def test_a_checkpoint_is_found_by_run_directory_and_own_name(tmp_path: Path) -> None:
    older = tmp_path / "run" / "checkpoints" / "step_1"
    newest = _write(tmp_path, tensor=1, data=1, zero=0)
    older.mkdir()
    write_manifest(older, manifest_of(1))
    for path in (tmp_path / "run", newest.parent, newest):
        assert find_checkpoint(path) == newest
    assert find_checkpoint(older) == older
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no complete checkpoint; give a run directory or one of its"):
            open_checkpoint(path)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step_3: this version cannot read its config"):
        open_checkpoint(_write(tmp_path, tensor=1, data=1, zero=0)).config()
