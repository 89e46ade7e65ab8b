"""What a rank's GPU holds: weights, activations and the window; less where components are offloaded.

The model is FLUX at its real width with a few of its blocks, and random weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from model_configs import write_folder
from rig import DEVICE, ON_GPUS, Pixels, Record, at_rest, distance, draw, needs, pixels, settings, side_by_side

from ditrelay import Engine, SamplingParams
from ditrelay.models.components import set_attention
from ditrelay.models.dummy import build_dummy, skeleton
from ditrelay.models.quirks import ATTENTION_BACKENDS
from ditrelay.runtime.messages import Heartbeat

MIB = 1 << 20
DIT, NON_DIT = 0, 1
SIDE, TEXT_TOKENS, WINDOW = 1024 if ON_GPUS else 64, 512, 2
TOLERANCE = 0.05
DTYPE = torch.bfloat16
# The same shape, small enough for a CPU.
SMALL = {
    "transformer": {"num_attention_heads": 2, "joint_attention_dim": 64, "num_layers": 1, "num_single_layers": 2},
    "text_encoder_2": {"d_model": 64, "d_ff": 64, "num_heads": 4, "d_kv": 16, "num_layers": 1},
    "vae": {"block_out_channels": [32, 32, 32, 32]},
}
CUT = {"transformer": {"num_layers": 4, "num_single_layers": 8}, "text_encoder_2": {"num_layers": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_folder("flux-schnell", tmp_path_factory.mktemp("flux"))
    for part, changes in (CUT if ON_GPUS else SMALL).items():
        config = made / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return made


# ---------------------------------------------------------------- the bare transformer


class Bare:
    """The transformer alone on this process's first GPU, and the inputs of one step of a request."""

    def __init__(self, folder: Path) -> None:
        device = torch.device(DEVICE)
        self.device = device
        if ON_GPUS:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.base = torch.cuda.memory_allocated(device) if ON_GPUS else 0
        path = folder / "transformer"
        self.transformer: Any = build_dummy(diffusers.FluxTransformer2DModel, path, dtype=DTYPE, device=device)
        config, tokens = self.transformer.config, (SIDE // 16) ** 2

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPE)

        self.inputs = dict(
            hidden_states=noise(1, tokens, config.in_channels),
            encoder_hidden_states=noise(1, TEXT_TOKENS, config.joint_attention_dim),
            pooled_projections=noise(1, config.pooled_projection_dim),
            timestep=torch.full((1,), 0.5, device=device, dtype=DTYPE),
            img_ids=torch.zeros(tokens, 3, device=device, dtype=DTYPE),
            txt_ids=torch.zeros(TEXT_TOKENS, 3, device=device, dtype=DTYPE),
        )

    def step(self) -> torch.Tensor:
        with torch.no_grad():
            return self.transformer(**self.inputs, return_dict=False)[0]

    def exact_step(self) -> torch.Tensor:
        """The same weights and inputs in float32."""
        inputs = {name: tensor.float() for name, tensor in self.inputs.items()}
        with torch.no_grad():
            return copy.deepcopy(self.transformer).float()(**inputs, return_dict=False)[0]

    def peak(self) -> int:
        """Bytes of weights and activations."""
        self.step()
        return torch.cuda.max_memory_allocated(self.device) - self.base

    @property
    def payload(self) -> int:
        """Bytes that one request's conditioning and latents have."""
        return sum(tensor.nbytes for tensor in self.inputs.values())


@pytest.fixture
def bare(folder: Path) -> Iterator[Bare]:
    made = Bare(folder)
    yield made
    del made.transformer
    if ON_GPUS:
        torch.cuda.empty_cache()


@needs(1)
def test_attention_kernels_agree_whatever_name_they_are_asked_for_by(bare: Bare, record_property: Record) -> None:
    """Within half as much again as bfloat16 makes of the whole transformer."""
    transformer = bare.transformer
    transformer.set_attention_backend("native")
    wanted = bare.step().float()
    allowed = 1.5 * _off(wanted, bare.exact_step())
    assert allowed < 0.4
    for name in ATTENTION_BACKENDS:
        set_attention(transformer, name, bare.device)
        assert _off(bare.step(), wanted) < allowed, name
    for kernels in ("_native_flash", "_native_cudnn") if ON_GPUS else ():
        transformer.set_attention_backend(kernels)
        off = _off(bare.step(), wanted)
        record_property(kernels, f"{off:.4f} off of {allowed:.4f} allowed")
        assert off < allowed, kernels


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, in units of that of what is wanted."""
    return float((found.float() - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------- the ranks of an engine


@dataclass(frozen=True)
class Run:
    """An engine's pictures, and its heartbeats at rest."""

    pictures: list[Pixels]
    ranks: list[Heartbeat]


def run(folder: Path, side: int, **offload: bool) -> Run:
    args = settings(
        model_path=str(folder), load_format="dummy", dtype="bfloat16", max_pending_transfers=WINDOW, **offload
    )
    params = [
        SamplingParams(prompt=f"{i} red apples", seed=i, height=side, width=side, num_inference_steps=2)
        for i in range(6)
    ]
    with Engine(args) as engine:
        pictures = [pixels(result) for result in draw(engine, params)]
        return Run(pictures, at_rest(engine))


@needs(2)
def test_a_dit_rank_needs_its_weights_its_activations_and_the_window(
    folder: Path, bare: Bare, record_property: Record
) -> None:
    ranks = run(folder, SIDE).ranks
    if not ON_GPUS:
        return
    needed = bare.peak() + 2 * WINDOW * bare.payload  # conditioning one way, latents the other
    record_property("peak", f"{ranks[DIT].device_peak / MIB:.0f} MiB, needed {needed / MIB:.0f} MiB")
    assert ranks[DIT].device_peak == pytest.approx(needed, rel=TOLERANCE)


@pytest.fixture(scope="module")
def offloaded(folder: Path) -> dict[str, Run]:
    """By the component that is offloaded; ``""``: none."""
    kinds = ("", "text_encoder", "vae", "dit")
    flags = [{f"{kind}_cpu_offload": True} if kind else {} for kind in kinds]
    runs = side_by_side(*(partial(run, folder, 256 if ON_GPUS else 64, **each) for each in flags))
    return dict(zip(kinds, runs, strict=True))


@needs(2)
@pytest.mark.parametrize(
    ("kind", "rank", "parts"),
    [
        ("text_encoder", NON_DIT, ("text_encoder", "text_encoder_2")),
        ("vae", NON_DIT, ("vae",)),
        ("dit", DIT, ("transformer",)),
    ],
)
def test_an_offloaded_component_leaves_its_gpu_and_draws_the_same(
    kind: str, rank: int, parts: tuple[str, ...], folder: Path, offloaded: dict[str, Run], record_property: Record
) -> None:
    plain, changed = offloaded[""], offloaded[kind]
    assert distance(plain.pictures, changed.pictures) < 0.05
    if not ON_GPUS:
        return
    freed = [a.device_allocated - b.device_allocated for a, b in zip(plain.ranks, changed.ranks, strict=True)]
    weights = sum(_weights(folder, part) for part in parts)
    record_property("freed", f"{freed[rank] / MIB:.0f} MiB, weights {weights / MIB:.0f} MiB")
    # Of a transformer, the block that the next step needs first may be there already.
    assert freed[rank] > (0.8 if kind == "dit" else 0.95) * weights
    assert abs(freed[1 - rank]) < 0.01 * plain.ranks[1 - rank].device_allocated
    if kind == "dit":
        assert changed.ranks[DIT].device_peak < 0.6 * plain.ranks[DIT].device_peak


def _weights(folder: Path, part: str) -> int:
    """Bytes of a component's parameters in bfloat16; it may keep some in float32."""
    library, name = json.loads((folder / "model_index.json").read_text())[part]
    cls = getattr(diffusers if library == "diffusers" else transformers, name)
    return 2 * sum(parameter.numel() for parameter in skeleton(cls, folder / part).parameters())
