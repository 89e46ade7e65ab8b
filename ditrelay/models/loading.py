"""From a model card to the adapter of one rank, with the components of that rank's roles only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditrelay.errors import ConfigError
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.timed_options import TimedOptions

if TYPE_CHECKING:
    from ditrelay.models.adapter import StageAdapter

# What a forkserver imports so that its workers load fast: everything that loading any supported family imports, and
# what the built-in model needs.
PRELOAD: tuple[str, ...] = (
    "ditrelay.models.modular",
    "diffusers.modular_pipelines.z_image.modular_blocks_z_image",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_z_image",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.tokenization_utils_tokenizers",
)

DTYPES = ("float32", "bfloat16", "float16")


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
