"""``--load-format dummy``: components from configs alone, as from_pretrained would have made them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
import transformers

from ditrelay.engine import Engine
from ditrelay.errors import UnsupportedModel
from ditrelay.models.card import load_card
from ditrelay.models.dummy import build_dummy
from ditrelay.models.folder import ModelFolder
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import COLOCATED

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture
def bare(tiny_root: Path, tmp_path: Path) -> Path:
    """A folder with configs, tokenizer and scheduler, and no weights."""
    return _without_weights(tiny_models.build("flux", tiny_root), tmp_path / "flux")


def _without_weights(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    return copy


def _models(folder: Path) -> Iterator[tuple[Any, Path]]:
    """The class and the folder of every component that has weights."""
    for name, (library, cls) in ModelFolder(folder).components.items():
        found = getattr(diffusers if library == "diffusers" else transformers, cls)
        if issubclass(found, torch.nn.Module):
            yield found, folder / name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", tiny_models.BUILDERS)
def test_tensors_have_the_names_shapes_dtypes_and_ties_of_loaded_ones(
    family: str, dtype: torch.dtype, tiny_root: Path
) -> None:
    for cls, path in _models(tiny_models.build(family, tiny_root)):
        loaded = cls.from_pretrained(str(path), dtype=dtype)
        dummy = build_dummy(cls, path, dtype=dtype, device=CPU)
        assert _described(dummy.named_parameters()) == _described(loaded.named_parameters()), path
        assert _described(dummy.named_buffers()) == _described(loaded.named_buffers()), path
        assert not dummy.training


@pytest.mark.parametrize("family", tiny_models.BUILDERS)
def test_what_is_computed_at_construction_is_as_in_a_loaded_model(family: str, tiny_root: Path) -> None:
    for cls, path in _models(tiny_models.build(family, tiny_root)):
        loaded = dict(cls.from_pretrained(str(path), dtype=torch.bfloat16).named_buffers())
        for name, buffer in build_dummy(cls, path, dtype=torch.bfloat16, device=CPU).named_buffers():
            if "running_" not in name:  # statistics are trained, like weights
                assert torch.equal(buffer, loaded[name]), f"{path}: {name}"


def _described(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}


def test_weights_are_the_same_each_time_and_no_two_alike(bare: Path) -> None:
    cls, path = diffusers.FluxTransformer2DModel, bare / "transformer"
    twice = [build_dummy(cls, path, dtype=torch.float32, device=CPU) for _ in range(2)]
    first, second = (dict(model.named_parameters()) for model in twice)
    assert all(torch.equal(first[name], second[name]) for name in first)
    query, key = first["transformer_blocks.0.attn.to_q.weight"], first["transformer_blocks.0.attn.to_k.weight"]
    assert not torch.equal(query, key) and query.std() == pytest.approx(query.shape[1] ** -0.5, rel=0.1)
    assert not first["transformer_blocks.0.attn.to_q.bias"].any()
    assert (first["transformer_blocks.0.attn.norm_q.weight"] == 1).all()


@pytest.mark.parametrize("family", tiny_models.BUILDERS)
def test_a_folder_without_weights_makes_pixels_that_are_finite_and_not_flat(
    family: str, tiny_root: Path, tmp_path: Path
) -> None:
    card = load_card(str(_without_weights(tiny_models.build(family, tiny_root), tmp_path / family)), "dummy")
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED, load_format="dummy"))
    requests = [tiny_models.small_request(card, num_inference_steps=2)]
    with torch.no_grad():
        session = adapter.begin(requests, adapter.encode(requests))
        while adapter.step(session):
            pass
        (pixels,) = adapter.decode(requests, adapter.finish(session))
    assert pixels.dtype == np.uint8 and pixels.std() > 1


def test_missing_weights_are_refused_unless_dummy_ones_are_asked_for(bare: Path) -> None:
    with pytest.raises(UnsupportedModel, match="has no weights"):
        load_card(str(bare))
    assert load_card(str(bare), "dummy").family == "flux"
    (bare / "vae" / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match="vae/config.json is missing"):
        load_card(str(bare), "dummy")


def test_weights_on_the_hub_are_not_downloaded_for_dummy_ones(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(bare)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_card("owner/model", "dummy")
    assert asked and not any(pattern.endswith("safetensors") for pattern in asked)


def test_an_engine_serves_a_folder_without_weights(bare: Path) -> None:
    args = ServerArgs(
        model_path=str(bare), load_format="dummy", device="cpu", num_gpus=2, enable_disagg=True, warmup=False
    )
    with Engine(args) as engine:
        result = engine.generate("a cat", height=32, width=32, num_inference_steps=2, seed=1)
    assert result.media
