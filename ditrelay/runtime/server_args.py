"""Every setting of a server, once: the dataclass field is the Python argument, the CLI flag and the help text."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any, TypeVar

from ditrelay.errors import ConfigError
from ditrelay.runtime.degrees import check_group, split_sequence

T = TypeVar("T")

_WEEK = 7 * 24 * 3600.0
_BYTE_UNITS: dict[str, int] = (
    {"": 1, "b": 1}
    | {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
    | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
)


@dataclass(frozen=True)
class FlagSpec:
    """What a field's metadata says about its flag.

    Attributes:
        help: one sentence for ``--help``.
        group: the heading of the flag in ``--help``.
        choices: allowed strings; empty: any non-empty string.
        minimum: smallest allowed number.
        above: the number must be larger than this.
        maximum: largest allowed number.
        metavar: placeholder in ``--help`` (``SECONDS``).
        is_bytes: the command line accepts ``512MiB`` and the like.
        suffix: how a file name must end (``.json``).
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    metavar: str | None = None
    is_bytes: bool = False
    suffix: str | None = None


def _flag(default: T, group: str, help: str, **spec: Any) -> T:
    """A dataclass field with its flag; typed as the field's value, as ``dataclasses.field`` is."""
    value: T = dataclasses.field(default=default, metadata={"flag": FlagSpec(help, group, **spec)})
    return value


def _seconds(default: float, help: str) -> float:
    return _flag(default, "Limits", help, above=0, maximum=_WEEK, metavar="SECONDS")


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """The settings of one server or engine, checked on construction.

    Raises:
        ConfigError: a value is wrong; names the flag and what is allowed.
    """

    model_path: str = _flag("builtin:emoji", "Model", "Diffusers folder, hub id, or builtin:emoji.", metavar="MODEL")
    served_model_name: str | None = _flag(
        None, "Model", "The model's name in the HTTP API; the model path where it isn't given."
    )
    load_format: str = _flag(
        "auto",
        "Model",
        "Where weights are from; dummy: random ones of the right sizes, for measurements without weight files.",
        choices=("auto", "dummy"),
    )
    dtype: str = _flag(
        "auto",
        "Model",
        "Weights and activations; auto: float32 on CPU, bfloat16 on GPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attention_backend: str = _flag(
        "auto",
        "Model",
        "Attention kernels; fa falls back with a warning where it isn't installed.",
        choices=("auto", "fa", "torch_sdpa", "sage", "xformers"),
    )
    enable_torch_compile: bool = _flag(False, "Model", "Compile the transformer's blocks.")
    text_encoder_cpu_offload: bool = _flag(
        False, "Model", "Keep the encoders' weights in host memory; on the device only while they encode."
    )
    vae_cpu_offload: bool = _flag(
        False, "Model", "Keep the VAE's weights in host memory; on the device only while it is needed."
    )
    dit_cpu_offload: bool = _flag(
        False, "Model", "Keep the transformer's weights in host memory; its blocks are copied in as they are needed."
    )
    warmup: bool = _flag(True, "Model", "Run one small request through every rank before reporting ready.")

    device: str = _flag(
        "auto", "Ranks", "Where the ranks run; auto: GPUs where there are any.", choices=("auto", "cuda", "cpu")
    )
    num_gpus: int = _flag(1, "Ranks", "Number of ranks: GPUs, or processes on a CPU.", minimum=1)
    enable_disagg: bool = _flag(False, "Ranks", "Put encode and decode on ranks of their own, the last ones.")
    num_non_dit_ranks: int = _flag(1, "Ranks", "Ranks that encode and decode (with --enable-disagg).", minimum=1)
    num_encoder_ranks: int | None = _flag(
        None, "Ranks", "Of the non-DiT ranks, those that only encode (with --enable-disagg).", minimum=1
    )
    num_decoder_ranks: int | None = _flag(
        None, "Ranks", "Of the non-DiT ranks, those that only decode (with --enable-disagg).", minimum=1
    )
    sp_degree: int = _flag(1, "Ranks", "Sequence parallel ranks per DiT replica; alone: Ulysses.", minimum=1)
    ulysses_degree: int | None = _flag(
        None, "Ranks", "Of the sequence parallel ranks, those that split by attention heads (Ulysses).", minimum=1
    )
    ring_degree: int | None = _flag(
        None, "Ranks", "Of the sequence parallel ranks, those that split keys and values (ring attention).", minimum=1
    )
    tp_size: int = _flag(1, "Ranks", "Tensor parallel ranks per DiT replica.", minimum=1)
    cfg_parallel_degree: int = _flag(
        1, "Ranks", "2: the prompt and the negative prompt of a step on two ranks.", minimum=1, maximum=2
    )

    use_async_comm: bool = _flag(
        True, "Transfer", "Overlap stages and transfers; false: lock-step, one request at a time (the baseline)."
    )
    transfer_backend: str = _flag(
        "auto",
        "Transfer",
        "How tensors cross edges; auto: CUDA IPC where two GPUs reach each other's memory, else torch (NCCL, gloo).",
        choices=("auto", "torch", "cuda_ipc"),
    )
    max_pending_transfers: int = _flag(2, "Transfer", "Payloads on the way or waiting, per edge.", minimum=1)
    max_pending_bytes: int = _flag(
        1 << 30,
        "Transfer",
        "Bytes on the way or waiting, per edge (512MiB, 1GiB, ...).",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    transfer_checksum: bool = _flag(False, "Transfer", "Check a CRC-32 of every payload (for debugging).")

    host: str = _flag("127.0.0.1", "Server", "Address to listen on.", metavar="ADDRESS")
    port: int = _flag(30000, "Server", "Port to listen on; 0: a free one.", minimum=0, maximum=65535)
    log_level: str = _flag("info", "Server", "Least level logged.", choices=("debug", "info", "warning", "error"))
    trace: str | None = _flag(
        None,
        "Server",
        "Write a timeline of the run at its end: this file for ui.perfetto.dev, and .html and .png beside it.",
        metavar="FILE.json",
        suffix=".json",
    )

    max_queue: int = _flag(256, "Limits", "Requests that may wait; past it a request is refused.", minimum=1)
    max_attempts: int = _flag(3, "Limits", "Times a request is tried when workers die under it.", minimum=1)
    dist_timeout: float = _seconds(60.0, "For one transfer or one edge set-up.")
    stage_timeout: float = _seconds(600.0, "A stage may go without progress this long.")
    request_timeout: float = _seconds(3600.0, "For a request, from submission to end.")
    startup_timeout: float = _seconds(600.0, "For the workers to start and load the model.")

    def __post_init__(self) -> None:
        for flag in server_flags():
            object.__setattr__(self, flag.name, flag.check(getattr(self, flag.name)))
        self._check_ranks()

    def _check_ranks(self) -> None:
        if self.enable_disagg:
            self._check_disagg()
        # Given by the other two, it is their product from here on.
        object.__setattr__(self, "sp_degree", math.prod(self.sequence_split))
        check_group(sp=self.sp_degree, tp=self.tp_size, cfg=self.cfg_parallel_degree, ranks=self.num_dit_ranks)
        if self.dit_cpu_offload and self.tp_size > 1:
            raise ConfigError(
                "--dit-cpu-offload", f"can't be combined with --tp-size {self.tp_size}; allowed: --tp-size 1"
            )

    def _check_disagg(self) -> None:
        if self.num_gpus < 2:
            raise ConfigError("--num-gpus", f"{self.num_gpus} is too few for --enable-disagg; allowed: 2 or more")
        if self.num_non_dit_ranks >= self.num_gpus:
            raise ConfigError(
                "--num-non-dit-ranks",
                f"{self.num_non_dit_ranks} leaves no DiT rank of {self.num_gpus}; allowed: 1 to {self.num_gpus - 1}",
            )
        self._check_split()

    def _check_split(self) -> None:
        encoders, decoders, total = self.num_encoder_ranks, self.num_decoder_ranks, self.num_non_dit_ranks
        if encoders is not None and decoders is not None:
            if encoders + decoders != total:
                raise ConfigError(
                    "--num-non-dit-ranks",
                    f"{total} is not the sum of --num-encoder-ranks {encoders} and --num-decoder-ranks {decoders}; "
                    f"allowed: {encoders + decoders}",
                )
            return
        for flag, given, other in (
            ("--num-encoder-ranks", encoders, "decoder"),
            ("--num-decoder-ranks", decoders, "encoder"),
        ):
            if given is not None and given >= total:
                allowed = f"1 to {total - 1}" if total > 1 else "none here; raise --num-non-dit-ranks to 2 or more"
                raise ConfigError(flag, f"{given} of {total} non-DiT ranks leaves no {other} rank; allowed: {allowed}")

    @property
    def model_name(self) -> str:
        """The model's name in the HTTP API."""
        return self.served_model_name or self.model_path

    @property
    def num_dit_ranks(self) -> int:
        """Ranks that denoise: all of them, less the non-DiT ranks where stages are disaggregated."""
        return self.num_gpus - self.num_non_dit_ranks if self.enable_disagg else self.num_gpus

    @property
    def offload(self) -> frozenset[str]:
        """Those of ``text_encoder``, ``vae`` and ``dit`` whose weights live in host memory."""
        kinds = {
            "text_encoder": self.text_encoder_cpu_offload,
            "vae": self.vae_cpu_offload,
            "dit": self.dit_cpu_offload,
        }
        return frozenset(kind for kind, is_offloaded in kinds.items() if is_offloaded)

    @property
    def sequence_split(self) -> tuple[int, int]:
        """(Ulysses degree, ring degree) of a replica; their product is ``sp_degree``."""
        return split_sequence(self.sp_degree, self.ulysses_degree, self.ring_degree)

    @property
    def encoder_decoder_split(self) -> tuple[int, int] | None:
        """(encoder ranks, decoder ranks) where encode and decode have ranks of their own, else ``None``."""
        encoders, decoders, total = self.num_encoder_ranks, self.num_decoder_ranks, self.num_non_dit_ranks
        if not self.enable_disagg or (encoders is None and decoders is None):
            return None
        if encoders is None:
            encoders = total - typing.cast(int, decoders)
        return encoders, total - encoders


@dataclass(frozen=True)
class Flag:
    """One field of ``ServerArgs`` as a command-line flag.

    Attributes:
        name: the field (``sp_degree``).
        kind: ``bool``, ``int``, ``float`` or ``str``.
        optional: ``None`` is allowed.
        default: the field's default.
        spec: its help text and limits.
    """

    name: str
    kind: type
    optional: bool
    default: object
    spec: FlagSpec

    @property
    def option(self) -> str:
        """The spelling on the command line (``--sp-degree``)."""
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """What the flag takes, in words: ``an integer from 0 to 65535``."""
        if self.kind is bool:
            return "true or false"
        if self.spec.suffix:
            return f"a file name that ends in {self.spec.suffix}"
        if self.kind is str:
            return ", ".join(self.spec.choices) or "a text that is not empty"
        noun = "a number" if self.kind is float else "an integer"
        if self.spec.is_bytes:
            noun = "a number of bytes (with a unit or without: 512MiB, 1GiB)"
        if self.spec.minimum is not None and self.spec.maximum is not None:
            return f"{noun} from {self.spec.minimum:g} to {self.spec.maximum:g}"
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (
                ("of at least", self.spec.minimum),
                ("above", self.spec.above),
                ("of at most", self.spec.maximum),
            )
            if bound is not None
        ]
        return " and ".join([f"{noun} {bounds[0]}", *bounds[1:]]) if bounds else noun

    def check(self, value: object) -> object:
        """``value`` as the field keeps it (an int where a float is asked for becomes one).

        Raises:
            ConfigError: the value is of another type or outside the limits.
        """
        if value is None and self.optional:
            return value
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        # ``type(...) is``: True is an int to isinstance, and means that an argument went to the wrong field.
        if type(value) is not self.kind or not self._within(value):
            raise self.error(value)
        return value

    def parse(self, text: str) -> object:
        """The value that ``text`` on the command line stands for.

        Raises:
            ConfigError: it stands for none, or for one that is not allowed.
        """
        try:
            return self.check(self._convert(text.strip()))
        except (ValueError, OverflowError):
            raise self.error(text) from None

    def error(self, value: object) -> ConfigError:
        return ConfigError(self.option, f"{value!r} is not allowed; allowed: {self.allowed}")

    def _convert(self, text: str) -> object:
        if self.kind is bool:
            return parse_bool(text)
        if self.spec.is_bytes:
            return parse_bytes(text)
        return self.kind(text)

    def _within(self, value: object) -> bool:
        if isinstance(value, str) and self.spec.suffix:
            return PurePath(value).suffix == self.spec.suffix
        if isinstance(value, str):
            return value in self.spec.choices if self.spec.choices else bool(value.strip())
        assert isinstance(value, int | float)
        low, above, high = self.spec.minimum, self.spec.above, self.spec.maximum
        return (
            math.isfinite(value)
            and (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )


@cache
def server_flags() -> tuple[Flag, ...]:
    """Every field of ``ServerArgs`` as a flag, in the order of the fields."""
    hints = typing.get_type_hints(ServerArgs)
    return tuple(_as_flag(field, hints[field.name]) for field in dataclasses.fields(ServerArgs))


def _as_flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    return Flag(field.name, kind, optional, field.default, field.metadata["flag"])


def parse_bool(text: str) -> bool:
    """``true``/``false`` (also yes/no, on/off, 1/0, in any case).

    Raises:
        ValueError: it is none of these.
    """
    word = text.lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def parse_bytes(text: str) -> int:
    """``"512MiB"`` -> 536870912. Units: B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB, TB (of 1000), in any case.

    Raises:
        ValueError: it is not a number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    factor = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a number of bytes such as 512MiB")
    return round(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_bytes(count: int) -> str:
    """536870912 -> ``"512MiB"``: in the largest unit that keeps it whole, so that ``parse_bytes`` reads it back."""
    units = [(f"{prefix}iB", 1024**power) for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))]
    return next((f"{count // size}{unit}" for unit, size in units if count and count % size == 0), f"{count}B")
