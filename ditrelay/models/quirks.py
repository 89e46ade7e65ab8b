"""Per-family facts, as data: what a diffusers pipeline class needs that its config files do not say.

Source of the defaults and of the guidance rules: the signatures and checks of the stock pipelines of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Adapter = Literal["modular", "standard", "timed"]
Media = Literal["image", "video"]


def _frozen(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a family is guided.

    Attributes:
        default: the stock pipeline's default scale.
        via: ``guider`` (the scale is state of a guider component), ``input`` (an input of the blocks or of the call)
            or ``none``.
        above: classifier-free guidance is on for scales above this one; unused where ``negative`` is None.
        negative: the negative prompt where the client gives none; None: the family takes no negative prompt.
        always_negative: the blocks fail without negative embeddings even where guidance is off (a fault of diffusers).
        options: further arguments of the guider. ``use_original_formulation`` means pos + g * (pos - neg).
        embedded_flag: a key of the transformer's config that must be true for the scale to have an effect.
    """

    default: float
    via: Literal["guider", "input", "none"]
    above: float = 1.0
    negative: str | None = None
    always_negative: bool = False
    options: Mapping[str, Any] = field(default_factory=_frozen)
    embedded_flag: str | None = None


@dataclass(frozen=True, kw_only=True)
class TimestepArgument:
    """How a transformer takes the time.

    Attributes:
        name: of its argument.
        counts_up: it wants the part of the way that is done, (1000 - timestep) / 1000.
    """

    name: str = "timestep"
    counts_up: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """What ditrelay knows about one model family.

    Attributes:
        pipeline_classes: values of ``_class_name`` in ``model_index.json``.
        when: keys of ``model_index.json`` and the truth value that each must have.
        modular_class: diffusers' ``ModularPipeline`` subclass.
        patch: latent pixels per transformer token and side, where the pipeline packs the latents itself; None: read
            ``patch_size`` from the transformer's config.
        min_multiple: the pipeline's own divisibility check for height and width, where it is stricter than the models.
        max_side_key: a path in the transformer's config to a limit on tokens per side.
        inputs: inputs given to the blocks or the call beside those of the request.
        chat_template: the tokenizer must come with one.
        parallel: the plans that the transformer class has (``_cp_plan``: sp and
            ring, ``_tp_plan``: tp).
        strength: the stock image-to-image pipeline's default; None: the family starts from no picture by strength.
        looks_at_picture: a picture may be given that the transformer looks at, at every step.
        sampled_picture: the modular block takes the most likely latents of a picture, the stock pipeline draws them
            from their distribution; draw them.
        whole_picture: the modular block shows the image encoder the picture as it was stretched to the clip's size, the
            stock pipeline as it came; show it as it came.
        exact_timestep: the modular denoise block rounds the timestep to the weights' dtype (999 becomes 1000 in
            bfloat16), the stock pipeline does not; put the exact one back, here.
        encode_outputs: standard adapter only: the names under which the call takes ``encode_prompt``'s results.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    when: Mapping[str, bool] = field(default_factory=_frozen)
    adapter: Adapter = "modular"
    modular_class: str = ""
    media: Media
    patch: int | None = None
    min_multiple: int = 1
    max_side_key: str | None = None
    height: int = 1024
    width: int = 1024
    num_frames: int = 1
    fps: int = 0  # of a clip, as the family was trained
    steps: int = 50
    guidance: Guidance
    needs_image: bool = False
    strength: float | None = None
    looks_at_picture: bool = False
    sampled_picture: bool = False
    whole_picture: bool = False
    chat_template: bool = False
    inputs: Mapping[str, Any] = field(default_factory=_frozen)
    parallel: tuple[str, ...] = ()
    exact_timestep: TimestepArgument | None = None
    encode_outputs: tuple[str, ...] = ()

    @property
    def edits(self) -> bool:
        """A request may come with a picture or without."""
        return self.strength is not None or self.looks_at_picture

    @property
    def plans(self) -> tuple[str, ...]:
        """Ways to spread a denoise over ranks: ``parallel``, and ``cfg`` where a guider has two branches."""
        return (*self.parallel, "cfg") if self.guidance.via == "guider" else self.parallel


# Whose convolutions are faster on a GPU with channels last in memory: a decode of Wan 480p x 81 by 10% on an H100.
# AutoencoderKL is not among them: there a decode of FLUX at 1024x1024 takes 57% longer.
CHANNELS_LAST_VAES = frozenset({"AutoencoderKLWan"})

_WAN = Guidance(default=5.0, via="guider", negative="", always_negative=True)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="z-image",
        pipeline_classes=("ZImagePipeline",),
        modular_class="ZImageModularPipeline",
        media="image",
        strength=0.6,
        patch=2,
        min_multiple=16,
        max_side_key="axes_lens",
        guidance=Guidance(
            default=5.0, via="guider", above=0.0, negative="", options=_frozen(use_original_formulation=True)
        ),
        chat_template=True,
        exact_timestep=TimestepArgument(name="t", counts_up=True),
    ),
    Family(
        name="flux",
        pipeline_classes=("FluxPipeline",),
        modular_class="FluxModularPipeline",
        media="image",
        strength=0.6,
        patch=2,
        steps=28,
        guidance=Guidance(default=3.5, via="input", embedded_flag="guidance_embeds"),
        parallel=("sp", "ring", "tp"),
    ),
    Family(
        name="flux2-klein",
        pipeline_classes=("Flux2KleinPipeline",),
        when=_frozen(is_distilled=False),
        modular_class="Flux2KleinBaseModularPipeline",
        media="image",
        looks_at_picture=True,
        patch=2,
        guidance=Guidance(default=4.0, via="guider"),
        chat_template=True,
        parallel=("sp", "ring", "tp"),
    ),
    Family(
        name="flux2-klein-distilled",
        pipeline_classes=("Flux2KleinPipeline",),
        when=_frozen(is_distilled=True),
        modular_class="Flux2KleinModularPipeline",
        media="image",
        looks_at_picture=True,
        patch=2,
        steps=4,
        guidance=Guidance(default=1.0, via="none"),
        chat_template=True,
        parallel=("sp", "ring", "tp"),
    ),
    Family(
        name="qwen-image",
        pipeline_classes=("QwenImagePipeline",),
        modular_class="QwenImageModularPipeline",
        media="image",
        strength=0.6,
        sampled_picture=True,
        patch=2,
        guidance=Guidance(default=4.0, via="guider", negative=" "),
        inputs=_frozen(max_sequence_length=512),
        parallel=("sp", "tp"),  # no ring: diffusers' takes no attention mask
    ),
    Family(
        name="sd3",
        pipeline_classes=("StableDiffusion3Pipeline",),
        modular_class="StableDiffusion3ModularPipeline",
        media="image",
        strength=0.6,
        max_side_key="pos_embed_max_size",
        steps=28,
        guidance=Guidance(default=7.0, via="guider", negative=""),
    ),
    Family(
        name="wan",
        pipeline_classes=("WanPipeline",),
        when=_frozen(boundary_ratio=False, expand_timesteps=False),
        modular_class="WanModularPipeline",
        media="video",
        min_multiple=16,
        max_side_key="rope_max_seq_len",
        height=480,
        width=832,
        num_frames=81,
        fps=16,
        guidance=_WAN,
        parallel=("sp", "ring"),
        exact_timestep=TimestepArgument(),
    ),
    Family(
        name="wan-i2v",
        pipeline_classes=("WanImageToVideoPipeline",),
        when=_frozen(boundary_ratio=False, expand_timesteps=False),
        modular_class="WanImage2VideoModularPipeline",
        media="video",
        min_multiple=16,
        max_side_key="rope_max_seq_len",
        height=480,
        width=832,
        num_frames=81,
        fps=16,
        guidance=_WAN,
        needs_image=True,
        whole_picture=True,
        parallel=("sp", "ring"),
        exact_timestep=TimestepArgument(),
    ),
    Family(
        # no sp: its _cp_plan fails on the attention mask, which has one row for each of all the heads
        name="ltx",
        pipeline_classes=("LTXPipeline",),
        modular_class="LTXModularPipeline",
        media="video",
        min_multiple=32,
        height=512,
        width=704,
        num_frames=161,
        fps=25,
        guidance=Guidance(default=3.0, via="guider", negative="", always_negative=True),
        exact_timestep=TimestepArgument(),
    ),
    Family(
        name="cogvideox",
        pipeline_classes=("CogVideoXPipeline",),
        adapter="standard",
        media="video",
        min_multiple=8,
        fps=8,
        guidance=Guidance(default=6.0, via="input", negative=""),
        encode_outputs=("prompt_embeds", "negative_prompt_embeds"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """What a model that ships with ditrelay was made for: sizes, steps, guidance, strength, and its largest picture.

    Attributes:
        fixed_size: height and width, which are the same, are the only ones: of any other it makes nothing to look at.
        max_num_frames: more than it was trained on, as long as clips stay whole.
        fps: of a clip, as it was trained.
        text_tokens: what its prompts are padded or cut to; None: as the stock pipeline does. Only where padding is
            masked may it differ: then fewer tokens give the same picture to the last bit, and take less time to encode.
    """

    height: int
    width: int
    steps: int
    guidance: float
    strength: float = 0.0
    max_pixels: int
    fixed_size: bool = False
    num_frames: int = 1
    max_num_frames: int = 1
    fps: int = 0
    text_tokens: int | None = None


BUILTINS: Mapping[str, Builtin] = MappingProxyType(
    {
        "emoji": Builtin(
            height=128, width=128, steps=8, guidance=2.0, strength=0.5, max_pixels=512 * 512, text_tokens=128
        ),
        "emoji-video": Builtin(
            height=96,
            width=96,
            steps=8,
            guidance=2.0,
            max_pixels=96 * 96,
            fixed_size=True,
            num_frames=9,
            max_num_frames=17,
            fps=6,
        ),
    }
)

# How a denoise can be spread over ranks -> the flag that asks for it.
PLAN_FLAGS: Mapping[str, str] = MappingProxyType(
    {"sp": "--sp-degree", "ring": "--ring-degree", "tp": "--tp-size", "cfg": "--cfg-parallel-degree"}
)

# Our names -> diffusers' names, best first; the last one needs nothing but torch. Empty: diffusers' own default.
ATTENTION_BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "auto": (),
        "fa": ("_flash_3", "flash", "native"),
        "torch_sdpa": ("native",),
        "sage": ("sage", "native"),
        "xformers": ("xformers", "native"),
    }
)

# The same for ring attention, whose kernels must give the log-sum-exp beside the result; the others have none.
RING_BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"auto": ("_native_cudnn",), "fa": ("flash", "_native_cudnn"), "torch_sdpa": ("_native_cudnn",), "sage": ("sage",)}
)


def find_family(pipeline_class: str, model_index: Mapping[str, Any]) -> Family | None:
    """The family of a ``model_index.json``, or None where ditrelay has none."""
    for family in FAMILIES:
        if pipeline_class not in family.pipeline_classes:
            continue
        if all(bool(model_index.get(key)) == value for key, value in family.when.items()):
            return family
    return None


def family_named(name: str) -> Family:
    """The family called ``name``. Raises ``KeyError`` for an unknown one (an error of ours, not of a user)."""
    return {family.name: family for family in FAMILIES}[name]
