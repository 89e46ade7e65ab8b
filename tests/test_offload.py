"""CPU offload of encoders, VAE and transformer: same results, and the weights at home between two uses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from ditrelay.engine import Engine
from ditrelay.errors import ConfigError
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.components import ComponentStore
from ditrelay.models.folder import ModelFolder
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.offload import OFFLOADABLE, Parked
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import COLOCATED

META = torch.device("meta")
ALL = frozenset(OFFLOADABLE)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


def _draw(adapter: StageAdapter, card: ModelCard) -> np.ndarray[Any, Any]:
    requests = [tiny_models.small_request(card)]
    with torch.no_grad():
        session = adapter.begin(requests, adapter.encode(requests))
        while adapter.step(session):
            pass
        return adapter.decode(requests, adapter.finish(session))[0]


@pytest.mark.parametrize("family", tiny_models.BUILDERS)
def test_an_offloaded_model_draws_what_the_model_draws(family: str, tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build(family, tiny_root)))
    plain, offloaded = (
        _draw(load_adapter(LoadSpec(card=card, roles=COLOCATED, offload=offload)), card)
        for offload in (frozenset(), ALL)
    )
    assert np.array_equal(plain, offloaded)


def test_each_flag_offloads_its_own_components_only(tiny_root: Path) -> None:
    folder = tiny_models.build("wan-i2v", tiny_root)
    names = ("text_encoder", "image_encoder", "vae", "transformer")
    parked = {"text_encoder": {"text_encoder", "image_encoder"}, "vae": {"vae"}, "dit": set[str]()}
    for kind in OFFLOADABLE:
        spec = LoadSpec(card=load_card(str(folder)), roles=COLOCATED, offload=frozenset({kind}))
        store = ComponentStore(ModelFolder(folder), spec)
        components = {name: store.get(name) for name in names}
        assert set(store._parked) == parked[kind]
        assert _has_hooks(components["transformer"].blocks[0]) == (kind == "dit")


def _has_hooks(block: Any) -> bool:
    registry = getattr(block, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


class _Leaf:
    """Stands in for a parameter: torch lets no tensor of the CPU become one of the meta device."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


class _Module:
    def __init__(self) -> None:
        self.leaves = [_Leaf(torch.ones(2)), _Leaf(torch.arange(3))]

    def parameters(self) -> list[_Leaf]:
        return self.leaves[:1]

    def buffers(self) -> list[_Leaf]:
        return self.leaves[1:]


def test_weights_are_on_the_device_inside_the_block_only_also_when_it_fails() -> None:
    module: Any = _Module()
    parked = Parked(module, META)
    homes = [leaf.data for leaf in module.leaves]
    with pytest.raises(ValueError, match="inside"), parked:
        assert all(leaf.data.is_meta for leaf in module.leaves)
        raise ValueError("inside")
    assert all(leaf.data is home for leaf, home in zip(module.leaves, homes, strict=True))
    with parked:  # it was released
        assert module.leaves[1].data.is_meta


def test_a_device_without_memory_left_leaves_everything_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = _Module()
    parked = Parked(module, META)
    copies = iter([torch.ones(2, device="meta")])

    class Full:
        def to(self, *_: object, **__: object) -> torch.Tensor:
            for copy in copies:
                return copy
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(parked, "_homes", [Full(), Full()])
    with pytest.raises(torch.OutOfMemoryError), parked:
        pass
    assert all(isinstance(leaf.data, Full) for leaf in module.leaves)
    assert not parked._lock.locked()


def test_two_stages_use_one_component_after_each_other() -> None:
    parked = Parked(_Module(), META)  # type: ignore[arg-type]
    order: list[str] = []

    def other() -> None:
        with parked:
            order.append("other")

    thread = threading.Thread(target=other)
    with parked:
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join(5)
    assert order == ["first", "other"]


def test_offload_works_with_async_disaggregation() -> None:
    settings: dict[str, Any] = dict(device="cpu", warmup=False)
    prompts = ["a red apple", "two dogs"]
    with Engine(ServerArgs(**settings)) as engine:
        expected = [result.media for result in engine.generate(prompts, num_inference_steps=3, seed=3)]
    settings |= dict(text_encoder_cpu_offload=True, vae_cpu_offload=True, dit_cpu_offload=True)
    with Engine(ServerArgs(enable_disagg=True, num_gpus=2, **settings)) as engine:
        assert [result.media for result in engine.generate(prompts, num_inference_steps=3, seed=3)] == expected


def test_an_offloaded_transformer_with_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="dit_cpu_offload.*tp_size 2"):
        ServerArgs(num_gpus=2, tp_size=2, dit_cpu_offload=True)
    assert ServerArgs(num_gpus=2, sp_degree=2, dit_cpu_offload=True).offload == {"dit"}
