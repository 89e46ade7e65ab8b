"""A denoise that goes on in another process: what it is handed is all that it needs, whatever the family."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch

from ditrelay.errors import CodecError
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.memory import StepMemory, put_back
from ditrelay.runtime.communication.codec import decode_payload, encode_state
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED

STEPS = 4
FAMILIES = sorted(set(tiny_models.BUILDERS) - {"cogvideox"})


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


def load(model: str) -> tuple[ModelCard, StageAdapter]:
    card = load_card(model)
    return card, load_adapter(LoadSpec(card=card, roles=COLOCATED))


def through_the_codec(state: State) -> State:
    payload = encode_state(state, batch_id="r", request_ids=["r"], checksum=True)
    copied = [tensor.clone() for tensor in payload.tensors]
    return decode_payload(type(payload)(payload.header, tuple(copied)))


def interrupted(adapter: StageAdapter, request: Request, conditioning: State, after: int) -> State:
    """Denoise ``after`` steps, hand over, do the rest in a session of its own."""
    first = adapter.begin([request], conditioning)
    for _ in range(after):
        adapter.step(first)
    captured = through_the_codec(adapter.capture(first))
    while adapter.step(first):  # what goes on must not change what was captured
        pass
    second = adapter.begin([request], conditioning)
    adapter.restore(second, captured)
    assert (second.steps_done, second.total_steps) == (after, STEPS)
    while adapter.step(second):
        pass
    return adapter.finish(second)


def check(card: ModelCard, adapter: StageAdapter, request: Request) -> None:
    conditioning = adapter.encode([request])
    session = adapter.begin([request], conditioning)
    while adapter.step(session):
        pass
    expected = adapter.finish(session)
    for after in range(1, STEPS):
        made = interrupted(adapter, request, conditioning, after)
        assert made.keys() == expected.keys()
        for name, entry in expected.items():
            value, other = entry.value, made[name].value
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other  # type: ignore[arg-type]
            assert same, f"{name} differs after {after} steps of {card.family}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoise_that_is_continued_elsewhere_gives_the_same_bytes(family: str, tiny_root: Path) -> None:
    card, adapter = load(str(tiny_models.build(family, tiny_root)))
    check(card, adapter, tiny_models.small_request(card, num_inference_steps=STEPS))


@pytest.mark.parametrize("model", ["builtin:emoji", "builtin:timed?encode=0&denoise=0&decode=0"])
def test_a_built_in_model_is_continued_too(model: str) -> None:
    card, adapter = load(model)
    params = card.resolve(SamplingParams(prompt="a red apple", seed=1, num_inference_steps=STEPS))
    check(card, adapter, Request(request_id="r", params=params))


def test_a_loop_with_its_place_in_local_variables_says_that_it_can_not_be_continued(tiny_root: Path) -> None:
    card, adapter = load(str(tiny_models.build("cogvideox", tiny_root)))
    request = tiny_models.small_request(card, num_inference_steps=STEPS)
    session = adapter.begin([request], adapter.encode([request]))
    adapter.step(session)
    with pytest.raises(CodecError, match="can't be continued"):
        adapter.capture(session)
    adapter.abandon(session)


# ---------------------------------------------------------------- what is written down


def place(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**values)


def test_only_what_the_steps_have_changed_is_captured() -> None:
    scope = place(latents=torch.zeros(2), prompt="a cat", embeds=[torch.ones(1)], mask=torch.zeros(3), done=False)
    scheduler = place(index=None, outputs=[None, None], sigmas=torch.ones(4), config={"order": 2})
    memory = StepMemory(scope, scheduler)
    scope.latents = torch.ones(2)
    scope.mask[0] = 1.0  # in place
    scope.noise = torch.zeros(2)  # scratch: made anew by every step
    scheduler.index, scheduler.outputs, scheduler.order = 1, [None, torch.ones(2)], 2
    captured = memory.changes(scope, scheduler)
    values = captured["values"].value
    assert isinstance(values, dict)
    assert {part: set(names) for part, names in values.items() if isinstance(names, dict)} == {
        "scope": {"latents", "mask"},
        "scheduler": {"index", "outputs", "order"},
    }


def test_every_kind_of_value_comes_back_as_it_was() -> None:
    generator = torch.Generator("cpu").manual_seed(1)
    begun = place(value=None, generator=generator), place(value=None)
    memory = StepMemory(*begun)
    values = {
        "a": [1, 2.5, float("inf"), None, True, "x", torch.Size((2, 3))],
        "b": (torch.arange(3), [torch.ones(1, dtype=torch.bfloat16)]),
    }
    begun[0].value, begun[1].value = values, float("-inf")
    torch.rand(5, generator=generator)
    captured = through_the_codec(memory.changes(*begun))
    expected = torch.rand(1, generator=generator)
    other = place(value=None, generator=torch.Generator("cpu").manual_seed(1)), place(value=None)
    put_back(captured, *other, torch.device("cpu"))
    made = other[0].value
    assert made["a"] == values["a"] and isinstance(made["b"], tuple)
    assert torch.equal(made["b"][0], torch.arange(3)) and made["b"][1][0].dtype is torch.bfloat16
    assert other[1].value == float("-inf")
    assert torch.equal(torch.rand(1, generator=other[0].generator), expected)


def _remembers() -> object:
    seen: list[float] = []
    return lambda t: seen.append(t)


@pytest.mark.parametrize(
    "hidden",
    [object(), copy, np.random.default_rng(1), _remembers()],
    ids=["object", "module", "generator", "function with a memory"],
)
def test_a_scheduler_that_may_hide_what_steps_change_is_refused_by_name(hidden: object) -> None:
    scope, scheduler = place(latents=torch.zeros(1)), place(tree=hidden)
    with pytest.raises(CodecError, match=r"scheduler\.tree"):
        StepMemory(scope, scheduler).changes(scope, scheduler)


def test_a_function_without_a_memory_hides_nothing_and_a_generator_is_written_down() -> None:
    scope, noise = place(latents=torch.zeros(1)), torch.Generator("cpu").manual_seed(1)
    scheduler = place(tau=lambda t: 1, noise=noise)
    captured = through_the_codec(StepMemory(scope, scheduler).changes(scope, scheduler))
    other = place(tau=scheduler.tau, noise=torch.Generator("cpu").manual_seed(2))
    put_back(captured, place(latents=torch.zeros(1)), other, torch.device("cpu"))
    assert torch.equal(other.noise.get_state(), scheduler.noise.get_state())


def test_a_changed_value_that_can_not_be_written_is_named() -> None:
    scope, scheduler = place(noise=None), place()
    memory = StepMemory(scope, scheduler)
    scope.noise = object()
    with pytest.raises(CodecError, match=r"scope\.noise: a object"):
        memory.changes(scope, scheduler)
