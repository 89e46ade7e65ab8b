"""``StageAdapter`` over an ordinary diffusers pipeline, for families without modular blocks.

Each role has a pipeline with only its own components, which runs only its own part: ``encode_prompt``, the call from
embeddings to latents, or ``decode_latents``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from ditrelay.errors import CodecError
from ditrelay.models.components import ComponentStore
from ditrelay.models.folder import ModelFolder
from ditrelay.models.pixels import to_frames
from ditrelay.models.quirks import family_named
from ditrelay.models.stepping import StepDriver, pause
from ditrelay.models.values import only, pack, unpack
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from ditrelay.models.adapter import DenoiseSession, Frames, Give
    from ditrelay.models.load_spec import LoadSpec
    from ditrelay.runtime.topology import Role

_COMPONENTS: Mapping[Role, tuple[str, ...]] = {
    "encode": ("tokenizer", "text_encoder"),
    "denoise": ("transformer", "scheduler"),
    "decode": ("vae",),
}


@dataclass
class StandardSession:
    """A denoise in progress. Belongs to one thread."""

    driver: StepDriver
    result: dict[str, torch.Tensor]

    @property
    def total_steps(self) -> int:
        return self.driver.total_steps

    @property
    def steps_done(self) -> int:
        return self.driver.steps_done


class StandardAdapter:
    """Each role is a pipeline of its own, with that role's components only."""

    latents_names = frozenset({"latents"})

    def __init__(self, spec: LoadSpec) -> None:
        """Raises ``UnsupportedModel`` for a component that can't be loaded."""
        self._family = family_named(spec.card.family)
        self._device = torch.device(spec.device)
        self.conditioning_names = frozenset(self._family.encode_outputs)
        folder = ModelFolder(Path(spec.card.path))
        self._components = components = ComponentStore(folder, spec)
        pipeline_class = getattr(diffusers, spec.card.pipeline_class)
        self._pipelines = {
            role: _pipeline(pipeline_class, folder.components, role, components) for role in sorted(spec.roles)
        }

    def encode(self, requests: Sequence[Request]) -> State:
        params = only(requests).params
        guidance = self._family.guidance
        with self._components.on_device(_COMPONENTS["encode"]):
            embeddings = self._pipelines["encode"].encode_prompt(
                prompt=params.prompt,
                negative_prompt=params.negative_prompt or guidance.negative,
                do_classifier_free_guidance=(params.guidance_scale or 0.0) > guidance.above,
                device=self._device,
                **self._family.inputs,
            )
        named = zip(self._family.encode_outputs, embeddings, strict=True)
        return {name: pack(name, value) for name, value in named if value is not None}

    def begin(self, requests: Sequence[Request], state: State) -> StandardSession:
        params = only(requests).params
        pipeline = copy.copy(self._pipelines["denoise"])
        pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        pipeline.progress_bar = lambda total: _LoopStart(pipeline)
        embeddings = {name: unpack(value, self._device) for name, value in state.items()}
        result: dict[str, torch.Tensor] = {}

        def loop() -> None:
            result["latents"] = _denoise(pipeline, params, embeddings)

        session = StandardSession(StepDriver(loop), result)
        session.driver.start()
        return session

    def step(self, session: DenoiseSession) -> bool:
        return _own(session).driver.step()

    def capture(self, session: DenoiseSession) -> State:
        """The loop keeps its place in local variables."""
        raise CodecError(f"a denoise of {self._family.name} can't be continued by another process")

    def restore(self, session: DenoiseSession, captured: State) -> None:
        raise CodecError(f"a denoise of {self._family.name} can't be continued by another process")

    def preview(self, session: DenoiseSession) -> State:
        raise ValueError(f"{self._family.name} can show no previews")

    def finish(self, session: DenoiseSession) -> State:
        session = _own(session)
        if "latents" not in session.result:
            raise ValueError("steps remain in this session, or it was abandoned")
        return {"latents": pack("latents", session.result["latents"])}

    def abandon(self, session: DenoiseSession) -> None:
        session = _own(session)
        session.driver.close()
        session.result.clear()

    def decode(self, requests: Sequence[Request], state: State, give: Give | None = None) -> list[Frames]:
        params = only(requests).params
        pipeline = self._pipelines["decode"]
        latents = unpack(state["latents"], self._device)
        frames = ((params.num_frames or 1) - 1) // pipeline.vae_scale_factor_temporal + 1
        with self._components.on_device(_COMPONENTS["decode"]):
            pixels = pipeline.decode_latents(latents[:, -frames:])  # CogVideoX 1.5 pads at the front
        return [to_frames(pipeline.video_processor.postprocess_video(video=pixels, output_type="pt")[0])]


class _LoopStart:
    """Stands in for the progress bar, which a pipeline opens right before its first step."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def __enter__(self) -> _LoopStart:
        pause(self._pipeline.num_timesteps)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass


def _pipeline(pipeline_class: Any, names: Iterable[str], role: Role, components: ComponentStore) -> Any:
    """A pipeline with the role's components; built with a config-only VAE, off which it reads its scale factors."""
    held = {name: components.get(name) for name in _COMPONENTS[role]}
    stand_in = {} if "vae" in held else {"vae": components.stand_in("vae")}
    every = dict.fromkeys([*names, *chain(*_COMPONENTS.values())])
    pipeline = pipeline_class(**(every | held | stand_in))
    for name in stand_in:
        setattr(pipeline, name, None)
    return pipeline


def _denoise(pipeline: Any, params: SamplingParams, embeddings: Mapping[str, Any]) -> torch.Tensor:
    def after_step(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 < pipeline.num_timesteps:
            pause(pipeline.num_timesteps)
        return tensors

    output = pipeline(
        height=params.height,
        width=params.width,
        num_frames=params.num_frames,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        callback_on_step_end=after_step,
        output_type="latent",
        return_dict=False,
        **embeddings,
    )
    latents: torch.Tensor = output[0]
    return latents


def _own(session: DenoiseSession) -> StandardSession:
    if not isinstance(session, StandardSession):
        raise TypeError(f"a StandardSession is needed, not a {type(session).__name__}")
    return session
