"""Real pictures through real ranks: the same seed gives the same picture in every mode, and the stock pipeline's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import ConfigError
from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.pipelines_core.executors.sync_executor import SyncExecutor
from ditrelay.runtime.pipelines_core.pipeline import Batch
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.request import Request
from ditrelay.runtime.tickets import Result
from ditrelay.runtime.topology import COLOCATED

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a red apple", "a blue bird in the snow", "two dogs", "a small green car on a yellow background")
SEED = 11

Pixels = npt.NDArray[np.uint8]


def emoji(**changes: object) -> ServerArgs:
    return ServerArgs(**{"model_path": "builtin:emoji", "device": "cpu", "warmup": False, **changes})


@pytest.fixture(scope="module")
def oracle() -> list[bytes]:
    """The files that ``SyncExecutor`` makes: one process, no transfers."""
    card = load_card("builtin:emoji")
    pipeline = build_pipeline(load_adapter(LoadSpec(card=card, roles=COLOCATED)), COLOCATED)
    files = []
    for number, prompt in enumerate(PROMPTS):
        params = card.resolve(SamplingParams(prompt=prompt, seed=SEED + number))
        batch = Batch((Request(request_id=str(number), params=params),))
        output = SyncExecutor().execute(pipeline.stages, batch, emoji()).output
        assert output is not None
        files.append(output[0].data)
    return files


@pytest.fixture(scope="module")
def disaggregated() -> Iterator[Engine]:
    with Engine(emoji(enable_disagg=True, num_gpus=4)) as engine:
        yield engine


def test_async_disaggregated_equals_the_oracle_with_many_in_flight(oracle: list[bytes], disaggregated: Engine) -> None:
    tickets = [
        disaggregated.submit(SamplingParams(prompt=prompt, seed=SEED + number))
        for _ in range(3)
        for number, prompt in enumerate(PROMPTS)
    ]
    files = [ticket.result(120).media for ticket in tickets]
    assert files == oracle * 3
    assert disaggregated.overlap() > 0


def test_one_request_alone_equals_the_oracle(oracle: list[bytes], disaggregated: Engine) -> None:
    assert disaggregated.generate(PROMPTS[2], seed=SEED + 2).media == oracle[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_disagg": True, "num_gpus": 2, "use_async_comm": False},
        {},
        {
            "enable_disagg": True,
            "num_gpus": 3,
            "num_non_dit_ranks": 2,
            "num_encoder_ranks": 1,
            "num_decoder_ranks": 1,
            "verify_transfers": True,
        },
    ],
    ids=["lock-step", "colocated", "encoder and decoder apart"],
)
def test_every_other_mode_equals_the_oracle(oracle: list[bytes], changes: dict[str, object]) -> None:
    with Engine(emoji(**changes)) as engine:
        assert [result.media for result in engine.generate(PROMPTS, seed=SEED)] == oracle


def test_the_stock_pipeline_draws_the_same_picture(disaggregated: Engine) -> None:
    pipe = DiffusionPipeline.from_pretrained(disaggregated.card.path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(PROMPTS[:2]):
        ours = disaggregated.submit(SamplingParams(prompt=prompt, seed=SEED + number)).result(60)
        stock = pipe(
            prompt,
            height=ours.height,
            width=ours.width,
            num_inference_steps=ours.params.num_inference_steps,
            guidance_scale=ours.params.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(ours.seed),
        ).images[0]
        difference = np.abs(np.asarray(stock, np.int16) - pixels(ours))
        assert difference.max() <= 1


def pixels(result: Result) -> npt.NDArray[np.int16]:
    return np.asarray(result.image, np.int16)


def test_sizes_steps_and_guidance_are_the_requests_own(disaggregated: Engine) -> None:
    small = disaggregated.submit(SamplingParams(prompt="a cat", seed=1, height=64, width=96, num_inference_steps=3))
    large = disaggregated.submit(SamplingParams(prompt="a cat", seed=1, guidance_scale=0.0))
    assert (small.result(60).width, small.result(60).height) == (96, 64)
    assert large.result(60).image.size == (128, 128)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    root = tmp_path_factory.getbasetemp() / "tiny"
    return lambda family: str(tiny_models.build(family, root))


def test_the_guides_three_dit_ranks_with_sp_2_draw_what_one_rank_draws(tiny: Callable[[str], str]) -> None:
    sampling = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 4}
    with Engine(emoji(model_path=tiny("flux"))) as engine:
        expected = pixels(engine.generate("a cat", **sampling))
    with Engine(emoji(model_path=tiny("flux"), enable_disagg=True, num_gpus=4, sp_degree=2)) as engine:
        assert [unit.members for unit in engine.topology.units] == [(0, 1), (2,), (3,)]
        results = [engine.submit(SamplingParams(prompt="a cat", **sampling)) for _ in range(4)]
        made = [pixels(ticket.result(60)) for ticket in results]
        assert {span.rank for span in engine.spans if span.kind == "denoise"} == {0, 2}
    assert max(np.abs(each - expected).max() for each in made) <= 1


def test_a_clip_comes_out_as_an_mp4(tiny: Callable[[str], str]) -> None:
    import io

    import av

    with Engine(emoji(model_path=tiny("wan"), enable_disagg=True, num_gpus=2)) as engine:
        result = engine.generate("a boat", height=32, width=48, num_frames=9, num_inference_steps=2, seed=1)
    assert result.media_type == "video/mp4" and result.num_frames == 9
    with av.open(io.BytesIO(result.media)) as clip:
        assert clip.streams.video[0].average_rate == 16  # Wan's own
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (32, 48, 3)


def test_a_family_without_a_parallel_plan_is_refused_naming_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"sp_degree.*flux.*qwen-image.*wan"):
        Engine(emoji(enable_disagg=True, num_gpus=4, sp_degree=2))


def test_the_built_in_models_files_are_whole() -> None:
    card = load_card("builtin:emoji")
    assert json.loads((Path(card.path) / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    assert sum(file.stat().st_size for file in Path(card.path).rglob("*")) < 25e6
