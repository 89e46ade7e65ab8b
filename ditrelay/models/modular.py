"""``StageAdapter`` over Modular Diffusers: one file for every family that has modular blocks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from ditrelay.errors import UnsupportedModel
from ditrelay.models.blocks import after_loop
from ditrelay.models.components import ComponentStore
from ditrelay.models.exact_timestep import ExactTimestep
from ditrelay.models.folder import ModelFolder
from ditrelay.models.guidance import SplitGuidance, SteadyGuidance
from ditrelay.models.memory import StepMemory, put_back
from ditrelay.models.noise import DrawnFrom, draw_from, draws_noise
from ditrelay.models.picture_stand_ins import stand_in
from ditrelay.models.pixels import open_image, stretched, to_frames
from ditrelay.models.previews import finished, in_the_middle, latents_of
from ditrelay.models.quirks import TimestepArgument, family_named
from ditrelay.models.stepping import StepDriver, pause
from ditrelay.models.values import only, pack, unpack
from ditrelay.models.video_frames import GivenAway, gives_frames
from ditrelay.models.workflows import NOISE, Workflows, role_of
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from ditrelay.models.adapter import DenoiseSession, Frames, Give
    from ditrelay.models.load_spec import LoadSpec
    from ditrelay.runtime.topology import Role

_STAND_INS = ("vae", "transformer")  # the components that others read sizes off


@dataclass
class ModularSession:
    """A denoise in progress: the state of the blocks, and the loop that works on it. Belongs to one thread.

    ``scheduler`` is its own; ``memory`` tells what the steps have changed. Where previews are wanted, ``before`` is how
    the latents were before the last step, and ``complete`` does with latents what follows the loop.
    """

    driver: StepDriver
    state: PipelineState | None
    scheduler: Any
    memory: StepMemory
    complete: Callable[[torch.Tensor], State] | None = None
    before: torch.Tensor | None = None

    @property
    def total_steps(self) -> int:
        return self.driver.total_steps

    @property
    def steps_done(self) -> int:
        return self.driver.steps_done


class ModularAdapter:
    """Each role is a pipeline of its own, with that role's blocks and components only."""

    def __init__(self, spec: LoadSpec) -> None:
        """Raises ``UnsupportedModel`` for a component that can't be loaded."""
        self._family = family_named(spec.card.family)
        own = {} if spec.card.text_tokens is None else {"max_sequence_length": spec.card.text_tokens}
        self._fixed_inputs = {**self._family.inputs, **own}
        self._device = torch.device(spec.device)
        self._timestep = ExactTimestep(self._family.exact_timestep or TimestepArgument())
        # Wan's VAE keeps a cache between its frames, which encoding a picture and decoding a clip would share.
        self._vae_lock = threading.Lock()
        self._components = components = ComponentStore(ModelFolder(Path(spec.card.path)), spec)
        self._workflows = workflows = Workflows.of(self._family, self._before_step)
        self.conditioning_names, self.latents_names = workflows.conditioning_names, workflows.latents_names
        self._stages = {part: stage for part, stage in workflows.stages.items() if role_of(part) in spec.roles}
        self._size_multiple = spec.card.size_multiple
        self._pipelines = {part: self._pipeline(part, spec.card.path, components) for part in sorted(self._stages)}
        self._branches: dist.ProcessGroup | None = components.mesh.branches if components.mesh else None

    def encode(self, requests: Sequence[Request]) -> State:
        params = only(requests).params
        pipeline, state = self._prepare("encode", params, {})
        self._execute(self._workflows.part("encode", params), pipeline, state)
        return _collect(state, self._workflows.sent(params))

    def begin(self, requests: Sequence[Request], state: State) -> ModularSession:
        params = only(requests).params
        pipeline, blocks_state = self._prepare("denoise", params, state)
        driver = StepDriver(lambda: self._execute(self._workflows.part("denoise", params), pipeline, blocks_state))
        driver.start()
        if pipeline.scheduler.begin_index is None:  # else it takes the second of two equal timesteps
            pipeline.scheduler.set_begin_index(0)
        draw_from(pipeline.scheduler, blocks_state.get(NOISE))
        session = ModularSession(driver, blocks_state, pipeline.scheduler, StepMemory(driver.scope, pipeline.scheduler))
        if params.previews:
            session.complete = partial(self._complete, self._workflows.part("denoise", params), pipeline, blocks_state)
        return session

    def step(self, session: DenoiseSession) -> bool:
        session = _own(session)
        if session.complete is not None:
            session.before = latents_of(session.driver.scope)
        try:
            return session.driver.step()
        finally:
            self._timestep.value = None

    def preview(self, session: DenoiseSession) -> State:
        session = _own(session)
        if session.complete is None or session.before is None or session.driver.finished:
            raise ValueError("no step was done that more follow, or the request wants no previews")
        with torch.no_grad():
            latents = finished(session.before, session.driver.scope, session.scheduler)
            return in_the_middle(session.complete(latents))

    def _complete(self, part: str, pipeline: Any, state: PipelineState, latents: torch.Tensor) -> State:
        """What decode would get if ``latents`` came out of the loop; ``state`` stays as it is."""
        groups = {group: list(names) for group, names in state.kwargs_mapping.items()}
        own = PipelineState(dict(state.values), groups)
        own.set("latents", latents)
        for block in after_loop(self._stages[part]):
            block(pipeline, own)
        return _collect(own, self.latents_names)

    def capture(self, session: DenoiseSession) -> State:
        session = _own(session)
        done: State = {"steps_done": StateValue(session.steps_done)}
        return done | session.memory.changes(session.driver.scope, session.scheduler)

    def restore(self, session: DenoiseSession, captured: State) -> None:
        session, steps = _own(session), captured["steps_done"].value
        assert isinstance(steps, int)
        session.driver.skip_to(steps)
        put_back(captured, session.driver.scope, session.scheduler, self._device)

    def finish(self, session: DenoiseSession) -> State:
        session = _own(session)
        if session.state is None or not session.driver.finished:
            raise ValueError("steps remain in this session, or it was abandoned")
        return _collect(session.state, self.latents_names)

    def abandon(self, session: DenoiseSession) -> None:
        session = _own(session)
        session.driver.close()
        session.state = session.scheduler = session.complete = session.before = None

    def decode(self, requests: Sequence[Request], state: State, give: Give | None = None) -> list[Frames]:
        pipeline, blocks_state = self._prepare("decode", only(requests).params, state)
        if give is not None and gives_frames(pipeline.vae):
            to_unit = partial(pipeline.video_processor.postprocess_video, output_type="pt")
            pipeline.vae = GivenAway(pipeline.vae, to_unit, give)
            self._decode(pipeline, blocks_state)
            return []
        self._decode(pipeline, blocks_state)
        pixels = blocks_state.get("images" if self._family.media == "image" else "videos")
        return [to_frames(pixels[0])]

    def _decode(self, pipeline: Any, state: PipelineState) -> None:
        with DrawnFrom(state.get(NOISE)) if draws_noise(pipeline.vae) else nullcontext():
            self._execute("decode", pipeline, state)

    def component(self, name: str) -> Any:
        """A component that this rank holds. Raises ``UnsupportedModel`` where the model has none of that name."""
        return self._components.get(name)

    # ------------------------------------------------------------ set-up of a role

    def _pipeline(self, part: str, path: str, components: ComponentStore) -> Any:
        """A pipeline with the part's components, and with the sizes of the others.

        Built with the class of the full pipeline: diffusers would guess another one from the first block.
        """
        role, blocks = role_of(part), self._stages[part].blocks
        held = {name: components.get(name) for name in components.needed_by(blocks.expected_components)}
        pipeline_class = _on_device(getattr(diffusers, self._family.modular_class), self._device)
        pipeline = pipeline_class(blocks=blocks, pretrained_model_name_or_path=path)
        for name, component in held.items():
            setattr(pipeline, name, component)
        for name in _STAND_INS:
            if name not in pipeline.component_names:
                setattr(pipeline, name, components.stand_in(name))
        if role == "encode" and self._family.chat_template and not pipeline.tokenizer.chat_template:
            raise UnsupportedModel(f"the tokenizer in {path} has no chat template, which {self._family.name} needs")
        if part == "encode_edit" and self._family.strength is not None:
            # It rounds a picture down to multiples of 16, whatever the VAE.
            pipeline.image_processor.register_to_config(vae_scale_factor=self._size_multiple)
        if part == "denoise" and self._family.exact_timestep is not None:
            pipeline.transformer.register_forward_pre_hook(self._timestep, with_kwargs=True)
        return pipeline

    # ------------------------------------------------------------ one request

    def _prepare(self, role: Role, params: SamplingParams, state: State) -> tuple[Any, PipelineState]:
        """A pipeline and a state of this request's own: schedulers and guiders are changed by a run."""
        part = self._workflows.part(role, params)
        pipeline = copy.copy(self._pipelines[part])
        if "scheduler" in pipeline.component_names:
            pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        if "guider" in pipeline.component_names:
            pipeline.guider = self._guider(role, params)
        stage = self._stages[part]
        blocks_state = PipelineState()
        for name, value in state.items():
            blocks_state.set(name, unpack(value, self._device), value.kwargs_type)
        given = self._inputs(role, params)
        if params.image is not None and role == "encode":
            image = open_image(params)
            given["image"] = image if self._family.looks_at_picture else stretched(image, params)
            stand_in(pipeline, self._family, image, given[NOISE])
        if NOISE in state:
            del given[NOISE]
        for name, default in stage.defaults.items():
            if name in given or name not in blocks_state.values:
                blocks_state.set(name, given.get(name, default), stage.kwargs_types[name])
        return pipeline, blocks_state

    def _execute(self, part: str, pipeline: Any, state: PipelineState) -> None:
        # A denoise pauses between its steps: it holds nothing that another stage waits for.
        needed = pipeline.component_names if role_of(part) != "denoise" else ()
        with self._components.on_device(needed):
            for block, uses_vae in self._stages[part].leaves:
                with self._vae_lock if uses_vae else nullcontext():
                    block(pipeline, state)

    def _guider(self, role: Role, params: SamplingParams) -> Any:
        guidance = self._family.guidance
        if role == "encode" and guidance.always_negative:
            return SteadyGuidance()
        scale, enabled = params.guidance_scale, self._is_guided(params)
        if self._branches is not None and role == "denoise":
            return SplitGuidance(self._branches, guidance_scale=scale, enabled=enabled, **guidance.options)
        return SteadyGuidance(guidance_scale=scale, enabled=enabled, **guidance.options)

    def _is_guided(self, params: SamplingParams) -> bool:
        guidance = self._family.guidance
        return guidance.via == "guider" and (params.guidance_scale or 0.0) > guidance.above

    def _inputs(self, role: Role, params: SamplingParams) -> dict[str, Any]:
        """The request in the blocks' words."""
        inputs: dict[str, Any] = {
            "prompt": params.prompt,
            "negative_prompt": None,
            "height": params.height,
            "width": params.width,
            "num_frames": params.num_frames,
            "num_inference_steps": params.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(params.seed or 0),
            "output_type": "pt",
        }
        if self._is_guided(params):
            inputs["negative_prompt"] = params.negative_prompt or self._family.guidance.negative
        if self._family.guidance.via == "input":
            inputs["guidance_scale"] = params.guidance_scale
        if params.strength is not None:
            inputs["strength"] = params.strength
        return {**inputs, **self._fixed_inputs}

    def _before_step(self, blocks_state: Any, step: int, timestep: torch.Tensor) -> bool:
        wanted = pause(len(blocks_state.timesteps), step, blocks_state)
        if wanted:
            self._timestep.value = timestep
        return wanted


def _on_device(pipeline_class: Any, device: torch.device) -> Any:
    """The class with its device known. diffusers looks for it in every submodule: 10 ms a request for FLUX."""
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": property(lambda self: device)})


def _own(session: DenoiseSession) -> ModularSession:
    if not isinstance(session, ModularSession):
        raise TypeError(f"a ModularSession is needed, not a {type(session).__name__}")
    return session


def _collect(state: PipelineState, names: Iterable[str]) -> State:
    """The values that cross the next edge, latents first. None, "not there" in diffusers, does not travel."""
    groups = {name: group for group, members in state.kwargs_mapping.items() for name in members}
    ordered = sorted(names, key=lambda name: (name != "latents", name))
    present = {name: state.values[name] for name in ordered if state.values.get(name) is not None}
    return {name: pack(name, value, groups.get(name)) for name, value in present.items()}
