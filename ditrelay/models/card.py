"""What is known about a model before any process starts: its limits, defaults and family. No torch import."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import msgspec

from ditrelay.errors import ConfigError, InvalidRequest, UnsupportedModel
from ditrelay.models.edits import check_start, starting_picture, starting_size, starting_strength
from ditrelay.models.folder import BUILTIN_PREFIX, ModelFolder, find_folder
from ditrelay.models.picture_files import PictureFile
from ditrelay.models.plain import plain
from ditrelay.models.quirks import BUILTINS, FAMILIES, PLAN_FLAGS, Adapter, Builtin, Family, Media, find_family
from ditrelay.models.sizes import Sizes, sizes_of
from ditrelay.models.timed_options import TIMED_PREFIX, TimedOptions
from ditrelay.models.variants import check_variant
from ditrelay.runtime.request import PictureFormat, SamplingParams

MAX_GUIDANCE = 1000.0  # far above what any model draws with; far below what turns numbers into NaN, a black picture
_SEED_LIMIT = 2**63
_DRAWN_SEED_LIMIT = 2**31  # fits any client's integer type
_WEBP_SIDE = 16383  # the format has 14 bits for it
_MAX_PREVIEWS = 10


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be served.

    Attributes:
        path: the local folder; for ``builtin:timed`` the model path with its options.
        name: the model path as given.
        family: a name of ``quirks.FAMILIES``, or ``timed``.
        pipeline_class: diffusers' name of the stock pipeline.
        adapter: which ``StageAdapter`` runs it.
        media: what a request makes.
        min_steps: fewer denoising steps give no picture.
        size_multiple: height and width are multiples of it (pixels).
        max_height: where it is less than ``max_side``; ``max_width`` likewise.
        fps: frames a second of a clip; 0 for pictures.
        frame_multiple: the number of frames is k * frame_multiple + 1; 1: any number.
        needs_image: every request starts from a picture (image-to-video).
        edits: a request may start from a picture (image-to-image).
        default_strength: of such a request; 0 where it has none, since the model looks at the picture at every step.
        guidance_above: classifier-free guidance, and with it the negative prompt, has an effect above this scale.
        parallel: which of ``sp``, ``ring``, ``tp`` and ``cfg`` can spread a denoise over ranks (``Family.plans``).
        text_tokens: what prompts are padded or cut to; None: as the pipeline does.
        previews: it can show what a picture looks like while it is denoised.
    """

    path: str
    name: str
    family: str
    pipeline_class: str
    adapter: Adapter
    media: Media
    size_multiple: int
    frame_multiple: int = 1
    default_height: int
    default_width: int
    default_num_frames: int = 1
    fps: int = 0
    default_num_inference_steps: int
    default_guidance_scale: float
    max_prompt_chars: int = 4096
    max_side: int = 8192
    max_height: int | None = None
    max_width: int | None = None
    max_pixels: int = 4096 * 4096
    max_num_frames: int = 1
    min_steps: int = 1
    max_steps: int = 1000
    needs_image: bool = False
    edits: bool = False
    default_strength: float = 0.0
    supports_negative_prompt: bool = False
    supports_guidance: bool = False
    guidance_above: float = 1.0
    parallel: tuple[str, ...] = ()
    text_tokens: int | None = None
    previews: bool = False

    def resolve(self, params: SamplingParams, picture: PictureFile | None = None) -> SamplingParams:
        """``params`` with every default filled in and a seed drawn where none is given.

        Args:
            picture: what the file of ``params.image`` says of itself, where that was read before.

        Raises:
            InvalidRequest: names the field and says what is allowed.
        """
        params = plain(params)
        picture = starting_picture(self, params, picture)
        height, width = starting_size(self, params, picture)
        resolved = msgspec.structs.replace(
            params,
            height=self.default_height if height is None else height,
            width=self.default_width if width is None else width,
            num_frames=self.default_num_frames if params.num_frames is None else params.num_frames,
            num_inference_steps=(
                self.default_num_inference_steps if params.num_inference_steps is None else params.num_inference_steps
            ),
            guidance_scale=self.default_guidance_scale if params.guidance_scale is None else params.guidance_scale,
            seed=random.SystemRandom().randrange(_DRAWN_SEED_LIMIT) if params.seed is None else params.seed,
            strength=starting_strength(self, params),
            output_format="png" if params.output_format is None and self.media == "image" else params.output_format,
        )
        _check_prompt(self, resolved)
        _check_size(self, resolved)
        _check_frames(self, resolved)
        _check_range("num_inference_steps", resolved.num_inference_steps, self.min_steps, self.max_steps)
        _check_range("seed", resolved.seed, 0, _SEED_LIMIT - 1)
        _check_guidance(self, resolved)
        check_start(self, resolved, picture)
        _check_file(self, resolved)
        _check_previews(self, resolved)
        return resolved


def load_card(model_path: str, load_format: str = "auto") -> ModelCard:
    """The card of ``builtin:NAME``, ``builtin:timed?...``, a diffusers folder, or a hub id (which may be downloaded).

    Args:
        load_format: ``dummy`` needs no weight files.

    Raises:
        UnsupportedModel: the folder, a component or a file is missing or damaged, or the family is not supported.
    """
    if model_path.partition("?")[0] == TIMED_PREFIX:
        return _timed_card(model_path)
    weights = load_format != "dummy"
    folder = ModelFolder(find_folder(model_path, weights=weights))
    pipeline_class = str(folder.index.get("_class_name"))
    family = find_family(pipeline_class, folder.index)
    if family is None:
        known = ", ".join(sorted({name for each in FAMILIES for name in each.pipeline_classes}))
        raise UnsupportedModel(f"{model_path}: {_variant(pipeline_class, folder)} is not supported; supported: {known}")
    for needed in ("transformer", "vae", "scheduler"):
        if needed not in folder.components:
            raise UnsupportedModel(f"{folder.path / 'model_index.json'} names no {needed}")
    folder.check(weights=weights)
    try:
        check_variant(folder, family)
        card = _card(model_path, folder, family)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(f"a config.json in {folder.path} has a value of a wrong kind: {error}") from error
    builtin = BUILTINS.get(model_path.removeprefix(BUILTIN_PREFIX)) if model_path.startswith(BUILTIN_PREFIX) else None
    return card if builtin is None else _as_made(card, builtin)


def _as_made(card: ModelCard, builtin: Builtin) -> ModelCard:
    """The card with the defaults and limits that a built-in model was made for."""
    return msgspec.structs.replace(
        card,
        size_multiple=builtin.width if builtin.fixed_size else card.size_multiple,
        default_height=builtin.height,
        default_width=builtin.width,
        default_num_frames=builtin.num_frames,
        fps=builtin.fps,
        default_num_inference_steps=builtin.steps,
        default_guidance_scale=builtin.guidance,
        max_side=builtin.width if builtin.fixed_size else card.max_side,
        max_pixels=builtin.max_pixels,
        max_num_frames=builtin.max_num_frames,
        default_strength=builtin.strength,
        text_tokens=builtin.text_tokens,
    )


def check_parallel(card: ModelCard, *, sp: int = 1, ring: int = 1, tp: int = 1, cfg: int = 1) -> None:
    """Refuse a degree of sequence, tensor or guidance parallelism that the model has no plan for.

    Raises:
        ConfigError: names the flag and the families that have such a plan.
    """
    for (plan, flag), degree in zip(PLAN_FLAGS.items(), (sp, ring, tp, cfg), strict=True):
        if degree > 1 and plan not in card.parallel:
            able = ", ".join(family.name for family in FAMILIES if plan in family.plans)
            raise ConfigError(flag, f"{card.family} has no plan for {flag} {degree}; families that have one: {able}")


def _variant(pipeline_class: str, folder: ModelFolder) -> str:
    """The class, with the switches of ``model_index.json`` that make it a variant."""
    switches = {key for family in FAMILIES if pipeline_class in family.pipeline_classes for key in family.when}
    given = [f"{key}={folder.index[key]}" for key in sorted(switches) if folder.index.get(key)]
    return f"{pipeline_class} with {', '.join(given)}" if given else pipeline_class


def _card(name: str, folder: ModelFolder, family: Family) -> ModelCard:
    transformer = folder.config("transformer")
    sizes = sizes_of(family, folder.config("vae"), transformer)
    height, width, num_frames = sizes.trained or (family.height, family.width, family.num_frames)
    guidance = family.guidance
    flag = guidance.embedded_flag
    return ModelCard(
        path=str(folder.path),
        name=name,
        family=family.name,
        pipeline_class=str(folder.index["_class_name"]),
        adapter=family.adapter,
        media=family.media,
        size_multiple=sizes.multiple,
        frame_multiple=sizes.frame_multiple,
        default_height=_fitting(height, sizes),
        default_width=_fitting(width, sizes),
        default_num_frames=min(num_frames, sizes.max_frames),
        fps=family.fps,
        default_num_inference_steps=family.steps,
        default_guidance_scale=guidance.default,
        max_side=max(height, width) if sizes.ends_there else sizes.max_side,
        max_height=height if sizes.ends_there else None,
        max_width=width if sizes.ends_there else None,
        max_num_frames=sizes.max_frames,
        # Stretched to its last noise level, the schedule of a single step is 0 / 0.
        min_steps=2 if folder.scheduler.get("shift_terminal") else 1,
        needs_image=family.needs_image,
        edits=family.edits,
        default_strength=family.strength or 0.0,
        supports_negative_prompt=guidance.negative is not None,
        supports_guidance=guidance.via != "none" and (flag is None or bool(transformer.get(flag))),
        guidance_above=guidance.above,
        parallel=family.plans,
        previews=family.adapter == "modular",
    )


def _fitting(side: int, sizes: Sizes) -> int:
    """The family's default side, made to fit a model smaller or coarser than its kin."""
    return max(sizes.multiple, min(side, sizes.max_side) // sizes.multiple * sizes.multiple)


def _timed_card(model_path: str) -> ModelCard:
    options = TimedOptions.parse(model_path)
    return ModelCard(
        path=model_path,
        name=model_path,
        family="timed",
        pipeline_class="Timed",
        adapter="timed",
        media="video" if options.frames > 1 else "image",
        fps=16 if options.frames > 1 else 0,
        default_num_frames=options.frames,
        max_num_frames=max(1, options.frames),
        size_multiple=8,
        default_height=32,
        default_width=32,
        default_num_inference_steps=options.steps,
        default_guidance_scale=0.0,
        parallel=("sp", "ring", "tp", "cfg"),
        previews=True,
    )


# ---------------------------------------------------------------- checks of one request's resolved parameters


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_range(param: str, value: Any, lowest: int, highest: int) -> None:
    if not _is_int(value) or not lowest <= value <= highest:
        raise InvalidRequest(param, f"{value!r} is not allowed; allowed: {lowest} to {highest}")


def _check_prompt(card: ModelCard, params: SamplingParams) -> None:
    if not params.prompt.strip():
        raise InvalidRequest("prompt", "it is empty; say what to draw")
    for name, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt or "")):
        if len(text) > card.max_prompt_chars:
            raise InvalidRequest(name, f"{len(text)} characters; allowed: at most {card.max_prompt_chars}")


def _check_size(card: ModelCard, params: SamplingParams) -> None:
    sides, multiple = [], card.size_multiple
    allowed = str(multiple) if multiple == card.max_side else f"a positive multiple of {multiple}"
    limits = (("height", params.height, card.max_height), ("width", params.width, card.max_width))
    for name, side, limit in limits:
        if not isinstance(side, int) or not _is_int(side) or side < 1 or side % multiple:
            raise InvalidRequest(name, f"{side!r} is not allowed; allowed: {allowed}")
        if side > (limit or card.max_side):
            raise InvalidRequest(name, f"{side} pixels; allowed: at most {limit or card.max_side}")
        sides.append(side)
    if math.prod(sides) > card.max_pixels:
        raise InvalidRequest(
            "height", f"{sides[1]}x{sides[0]} pixels; allowed: at most {card.max_pixels} pixels in all"
        )


def _check_frames(card: ModelCard, params: SamplingParams) -> None:
    frames = params.num_frames
    if card.media == "image" and frames != 1:
        raise InvalidRequest("num_frames", f"{frames!r} is not allowed; this model makes pictures: allowed: 1")
    _check_range("num_frames", frames, 1, card.max_num_frames)
    step = card.frame_multiple
    if frames is not None and (frames - 1) % step:
        nearest = min(round((frames - 1) / step), (card.max_num_frames - 1) // step) * step + 1
        raise InvalidRequest("num_frames", f"{frames} is not allowed; allowed: {step}k + 1, the nearest is {nearest}")


def _check_guidance(card: ModelCard, resolved: SamplingParams) -> None:
    scale = resolved.guidance_scale
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale <= MAX_GUIDANCE:
        raise InvalidRequest("guidance_scale", f"{scale!r} is not allowed; allowed: 0 to {MAX_GUIDANCE:g}")
    # The default is taken as well: clients send back what they were told. Up to 1 a scale means no guidance anyway.
    if not (card.supports_guidance or scale <= 1 or scale == card.default_guidance_scale):
        raise InvalidRequest(
            "guidance_scale", f"{scale!r} is not allowed: this model has no guidance; leave it out; allowed: 0 to 1"
        )
    if not resolved.negative_prompt:
        return
    if not card.supports_negative_prompt:
        raise InvalidRequest("negative_prompt", "this model takes none; leave it out")
    if scale <= card.guidance_above:
        raise InvalidRequest(
            "negative_prompt", f"it has no effect at guidance_scale {scale}; allowed: above {card.guidance_above}"
        )


def _check_file(card: ModelCard, params: SamplingParams) -> None:
    kind, quality = params.output_format, params.output_compression
    if card.media == "video":
        for name, value in (("output_format", kind), ("output_compression", quality)):
            if value is not None:
                raise InvalidRequest(name, "this model makes MP4 clips; leave it out")
        return
    if kind not in get_args(PictureFormat):
        raise InvalidRequest("output_format", f"{kind!r} is not allowed; allowed: {', '.join(get_args(PictureFormat))}")
    if kind == "webp" and max(params.height or 0, params.width or 0) > _WEBP_SIDE:
        raise InvalidRequest("output_format", f"webp holds at most {_WEBP_SIDE} pixels a side; take png or jpeg")
    if quality is None:
        return
    _check_range("output_compression", quality, 0, 100)
    if kind == "png" and quality != 100:
        raise InvalidRequest(
            "output_compression", f"{quality} is not allowed with png, which loses nothing; allowed: 100"
        )


def _check_previews(card: ModelCard, params: SamplingParams) -> None:
    _check_range("previews", params.previews, 0, _MAX_PREVIEWS)
    if params.previews and not card.previews:
        raise InvalidRequest("previews", f"{card.family} can show none; leave it out")
