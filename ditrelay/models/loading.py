"""From a model card to the adapter of one rank, with the components of that rank's roles only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ditrelay.errors import ConfigError
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.timed_options import TimedOptions

if TYPE_CHECKING:
    from ditrelay.models.adapter import StageAdapter
    from ditrelay.models.card import ModelCard

# What a forkserver imports so that its workers load fast: everything that loading any supported family imports.
PRELOAD: tuple[str, ...] = (
    "ditrelay.models.modular",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "transformers.tokenization_utils_tokenizers",
)

# The same for the families of the built-in models, whose start a newcomer waits for.
_FAMILY_PRELOAD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "z-image": (
            "diffusers.modular_pipelines.z_image.modular_blocks_z_image",
            "diffusers.models.transformers.transformer_z_image",
            "transformers.models.qwen3.modeling_qwen3",
        ),
        # Not its blocks: they would say on stderr, before anybody can hide it, that torchvision is missing.
        "wan": (
            "diffusers.models.transformers.transformer_wan",
            "diffusers.schedulers.scheduling_unipc_multistep",
            "transformers.models.umt5.modeling_umt5",
            "av",
        ),
    }
)

DTYPES = ("float32", "bfloat16", "float16")


def preload(card: ModelCard) -> tuple[str, ...]:
    """Modules that the workers of this model import: with the timed model no diffusers, which takes seconds."""
    return () if card.adapter == "timed" else PRELOAD + _FAMILY_PRELOAD.get(card.family, ())


def load_adapter(spec: LoadSpec) -> StageAdapter:
    """Load the components of ``spec.roles`` and put them on the device.

    Raises:
        UnsupportedModel: a component can't be loaded; names it.
    """
    # Imported here, each where it is needed: the timed adapter must start without diffusers (4 s of imports).
    match spec.card.adapter:
        case "timed":
            from ditrelay.models.timed import TimedAdapter

            options = TimedOptions.parse(spec.card.path)
            return TimedAdapter(options, device=spec.device, world_size=spec.ranks)
        case "modular":
            from ditrelay.models.modular import ModularAdapter

            return ModularAdapter(spec)
        case "standard":
            from ditrelay.models.standard import StandardAdapter

            return StandardAdapter(spec)


def resolve_dtype(dtype: str, device: str) -> str:
    """``auto`` -> float32 on the CPU, bfloat16 on a GPU; other names are checked and returned.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype == "auto":
        return "float32" if device.startswith("cpu") else "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError("--dtype", f"{dtype!r} is not allowed; allowed: auto, {', '.join(DTYPES)}")
    return dtype
