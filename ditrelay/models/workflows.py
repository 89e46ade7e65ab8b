"""A family's stages, for requests that come with a picture and for those that don't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from ditrelay.models.blocks import BeforeStep, Stage, crossing, split_stages, with_step_hook
from ditrelay.models.quirks import Family
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.topology import Role

NOISE = "generator"
"""The generator that the VAE has drawn from when it encoded a picture: the noise goes on where that stopped."""

# Of a role, the part for requests with a picture, in families that draw without one as well.
_EDIT_PARTS: Mapping[Role, str] = {"encode": "encode_edit", "denoise": "denoise_edit"}


@dataclass(frozen=True)
class Workflows:
    """The stages of one family by part: a role's name, or that of its part for requests with a picture.

    Attributes:
        conditioning_names: names of the values that may cross the edge encode -> denoise.
        latents_names: names of the values that may cross the edge denoise -> decode.
    """

    family: Family
    stages: Mapping[str, Stage]
    conditioning_names: frozenset[str]
    latents_names: frozenset[str]

    @classmethod
    def of(cls, family: Family, before_step: BeforeStep) -> Workflows:
        """``before_step`` is called as ``with_step_hook`` says."""
        plain = split_stages(family)
        stages: dict[str, Stage] = {role: stage for role, stage in plain.items()}
        conditioning, latents = _crossing(plain)
        if family.edits:
            edits = split_stages(family, from_picture=True)
            stages |= {part: edits[role] for role, part in _EDIT_PARTS.items()}
            more, more_latents = _crossing(edits)
            conditioning, latents = conditioning | more | {NOISE}, latents | more_latents
        for part in stages:
            if role_of(part) == "denoise":
                stages[part] = with_step_hook(stages[part], before_step)
        return cls(family, stages, conditioning, latents)

    def is_edit(self, params: SamplingParams) -> bool:
        """Whether a request comes with a picture that it could do without."""
        return params.image is not None and self.family.edits

    def part(self, role: Role, params: SamplingParams) -> str:
        """The part of ``role`` that a request takes."""
        return _EDIT_PARTS.get(role, role) if self.is_edit(params) else role

    def sent(self, params: SamplingParams) -> frozenset[str]:
        """Of ``conditioning_names``, those that a request may send."""
        return self.conditioning_names if self.is_edit(params) else self.conditioning_names - {NOISE}


def role_of(part: str) -> Role:
    """The role whose part it is."""
    return next((role for role, edit in _EDIT_PARTS.items() if edit == part), cast("Role", part))


def _crossing(stages: Mapping[Role, Stage]) -> tuple[frozenset[str], frozenset[str]]:
    encode, denoise, decode = stages["encode"], stages["denoise"], stages["decode"]
    return crossing([encode], [denoise, decode]), crossing([encode, denoise], [decode])
