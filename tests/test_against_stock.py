"""Where the modular blocks alone would make something else than the stock pipelines; the rest is in ``test_parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from picture_samples import picture

from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.pixels import open_image
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED

MANY = 334  # from so many steps on, the first two timesteps are equal at the tiny Wan's shift of 3

Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


def both(model: Path, **fields: object) -> tuple[Pixels, Pixels]:
    """Our pixels and the stock pipeline's, in float32."""
    card = load_card(str(model))
    params = card.resolve(SamplingParams(prompt="a cat on a red chair", seed=7, **fields))
    return ours(card, params), stock(card, params)


def ours(card: ModelCard, params: SamplingParams) -> Pixels:
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    request = Request(request_id="r", params=params)
    session = adapter.begin([request], adapter.encode([request]))
    while adapter.step(session):
        pass
    return adapter.decode([request], adapter.finish(session))[0]


def stock(card: ModelCard, params: SamplingParams) -> Pixels:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clip = {"num_frames": params.num_frames} if card.media == "video" else {}
    output = pipeline(
        prompt=params.prompt,
        height=params.height,
        width=params.width,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        output_type="np",
        **clip,
        **({} if params.image is None else {"image": open_image(params)}),
    )
    rounded: Pixels = ((output.frames[0] if clip else output.images) * 255).round().astype(np.uint8)
    return rounded


def distance(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_so_many_steps_that_two_timesteps_are_equal_make_the_stock_pipelines_clip(tiny_root: Path) -> None:
    model = tiny_models.build("wan", tiny_root)
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.set_timesteps(MANY)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    mine, theirs = both(model, height=16, width=16, num_frames=1, num_inference_steps=MANY, guidance_scale=1.0)
    assert distance(mine, theirs) <= 1 and mine.std() > 0


@pytest.mark.parametrize(("height", "width"), [(96, 32), (32, 96)])
def test_a_picture_of_another_shape_than_the_clip_is_seen_as_the_stock_pipeline_sees_it(
    height: int, width: int, tiny_root: Path
) -> None:
    """Stretched for the VAE, as it came for the image encoder."""
    model = tiny_models.build("wan-i2v", tiny_root)
    size = {"height": height, "width": width}
    mine, theirs = both(model, **size, image=picture(64, 64), num_frames=5, num_inference_steps=3)
    assert mine.shape == theirs.shape == (5, height, width, 3)
    assert distance(mine, theirs) <= 1


def test_guidance_lasts_to_the_end_where_the_scheduler_asks_the_model_twice_a_step(tiny_root: Path) -> None:
    def with_heun() -> Any:
        pipeline = tiny_models.BUILDERS["sd3"]()
        pipeline.register_modules(scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0))
        return pipeline

    mine, theirs = both(tiny_models.build("sd3-heun", tiny_root, with_heun), height=32, width=32, num_inference_steps=3)
    assert distance(mine, theirs) <= 1 and mine.std() > 0
