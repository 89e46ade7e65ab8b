"""A Modular Diffusers pipeline cut into the three stages, and what each of them declares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, SequentialPipelineBlocks

from ditrelay.models.quirks import Family
from ditrelay.runtime.topology import Role

# Top-level block names; every other one (text, image and VAE encoders) belongs to the encode stage.
_STAGE_OF_BLOCK: Mapping[str, Role] = {"denoise": "denoise", "decode": "decode"}
_ROLES: tuple[Role, ...] = ("encode", "denoise", "decode")

BeforeStep = Callable[[Any, int, Any], bool]


@dataclass(frozen=True)
class Stage:
    """The blocks of one role in running order, conditional ones resolved, with their declarations read once.

    ``inputs`` of diffusers' blocks is recomputed at every access (16 ms for Qwen-Image), hence the copies.

    Attributes:
        leaves: each block, and whether it works with the VAE.
        defaults: every input that has a name, with its default.
        kwargs_types: the group of an input, where it has one.
        groups: input groups taken as a whole.
        outputs: what the blocks produce, with the group of each.
    """

    blocks: Any
    leaves: tuple[tuple[Any, bool], ...]
    defaults: Mapping[str, Any]
    kwargs_types: Mapping[str, str | None]
    groups: frozenset[str]
    outputs: Mapping[str, str | None]

    def takes(self, name: str, kwargs_type: str | None) -> bool:
        return name in self.defaults or kwargs_type in self.groups


def split_stages(family: Family, *, from_picture: bool = False) -> dict[Role, Stage]:
    """The stages of a family's modular pipeline, for requests that start from a picture or for those that don't."""
    pipeline_class = getattr(diffusers, family.modular_class)
    blocks = getattr(diffusers, pipeline_class.default_blocks_name)()
    triggers = {"prompt": True} | ({"image": True} if from_picture or family.needs_image else {})
    by_role: dict[Role, dict[str, Any]] = {role: {} for role in _ROLES}
    for name, leaf in blocks.get_execution_blocks(**triggers).sub_blocks.items():
        by_role[_STAGE_OF_BLOCK.get(name.partition(".")[0], "encode")][name.replace(".", "_")] = leaf
    return {role: _stage(leaves) for role, leaves in by_role.items()}


def crossing(upstream: list[Stage], downstream: list[Stage]) -> frozenset[str]:
    """Names produced upstream that a stage downstream takes: what crosses the edge between them."""
    produced = {name: group for stage in upstream for name, group in stage.outputs.items()}
    return frozenset(name for name, group in produced.items() if any(stage.takes(name, group) for stage in downstream))


def with_step_hook(stage: Stage, before_step: BeforeStep) -> Stage:
    """The stage with ``before_step(block_state, i, t)`` called before each turn of its denoise loop.

    A turn for which it returns False does nothing.
    """
    hooked = {name: _hooked(leaf, before_step) for name, leaf in stage.blocks.sub_blocks.items()}
    return _stage(hooked)


def after_loop(stage: Stage) -> list[Any]:
    """The blocks of a denoise stage that follow its loop."""
    leaves = [leaf for leaf, _ in stage.leaves]
    last = max(index for index, leaf in enumerate(leaves) if isinstance(leaf, LoopSequentialPipelineBlocks))
    return leaves[last + 1 :]


def _stage(leaves: Mapping[str, Any]) -> Stage:
    blocks = SequentialPipelineBlocks.from_blocks_dict(dict(leaves))
    inputs = blocks.inputs
    return Stage(
        blocks=blocks,
        leaves=tuple((leaf, "vae" in leaf.component_names) for leaf in leaves.values()),
        defaults={param.name: param.default for param in inputs if param.name},
        kwargs_types={param.name: param.kwargs_type for param in inputs if param.name},
        groups=frozenset(param.kwargs_type for param in inputs if not param.name),
        outputs={param.name: param.kwargs_type for param in blocks.intermediate_outputs},
    )


def _hooked(leaf: Any, before_step: BeforeStep) -> Any:
    if not isinstance(leaf, LoopSequentialPipelineBlocks):
        return leaf
    loop = copy.copy(leaf)  # the classes of diffusers hold some blocks as shared instances
    run_step = loop.loop_step

    def loop_step(components: Any, state: Any, **kwargs: Any) -> Any:
        wanted = before_step(state, kwargs["i"], kwargs["t"])
        return run_step(components, state, **kwargs) if wanted else (components, state)

    loop.loop_step = loop_step
    loop.set_progress_bar_config(disable=True)
    return loop
