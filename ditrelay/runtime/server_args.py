"""Every setting of a server, once: the dataclass field is the Python argument, the CLI flag and the help text."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from dataclasses import dataclass
from functools import cache

from ditrelay.errors import ConfigError, settings_as_fields
from ditrelay.runtime.degrees import check_ranks, split_sequence
from ditrelay.runtime.flags import Flag, as_flag, flag, seconds
from ditrelay.runtime.http_args import HttpArgs

API_KEY_VARIABLE = "DITRELAY_API_KEY"

OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
OTLP_TRACES_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"

_GROUPS = ("Model", "Ranks", "Transfer", "Server", "Jobs", "Limits")

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?(:[0-9]{1,5})?")


@dataclass(frozen=True, kw_only=True)
class ServerArgs(HttpArgs):
    """The settings of one server or engine, checked on construction.

    Raises:
        ConfigError: a value is wrong; names the field and what is allowed.
    """

    model_path: str = flag(
        "builtin:emoji",
        "Model",
        "Diffusers folder, hub id, builtin:emoji (pictures) or builtin:emoji-video (clips).",
        metavar="MODEL",
    )
    served_model_name: str | None = flag(
        None,
        "Model",
        "The model's name in the HTTP API, or several with commas: answers have the first; without it the model path.",
        metavar="NAMES",
    )
    load_format: str = flag(
        "auto",
        "Model",
        "Where weights are from; dummy: random ones of the right sizes, for measurements without weight files.",
        choices=("auto", "dummy"),
    )
    dtype: str = flag(
        "auto",
        "Model",
        "Weights and activations; auto: float32 on CPU, bfloat16 on GPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attention_backend: str = flag(
        "auto",
        "Model",
        "Attention kernels; fa falls back with a warning where it isn't installed.",
        choices=("auto", "fa", "torch_sdpa", "sage", "xformers"),
    )
    enable_torch_compile: bool = flag(False, "Model", "Compile the transformer's blocks.")
    text_encoder_cpu_offload: bool = flag(
        False, "Model", "Keep the encoders' weights in host memory; on the device only while they encode."
    )
    vae_cpu_offload: bool = flag(
        False, "Model", "Keep the VAE's weights in host memory; on the device only while it is needed."
    )
    dit_cpu_offload: bool = flag(
        False, "Model", "Keep the transformer's weights in host memory; its blocks are copied in as they are needed."
    )
    warmup: bool = flag(True, "Model", "Run one small request through every rank before reporting ready.")

    device: str = flag(
        "auto", "Ranks", "Where the ranks run; auto: GPUs where there are any.", choices=("auto", "cuda", "cpu")
    )
    num_gpus: int = flag(1, "Ranks", "Number of ranks: GPUs, or processes on a CPU.", minimum=1)
    enable_disagg: bool = flag(False, "Ranks", "Put encode and decode on ranks of their own, the last ones.")
    num_non_dit_ranks: int = flag(1, "Ranks", "Ranks that encode and decode (with --enable-disagg).", minimum=1)
    num_encoder_ranks: int | None = flag(
        None, "Ranks", "Of the non-DiT ranks, those that only encode (with --enable-disagg).", minimum=1
    )
    num_decoder_ranks: int | None = flag(
        None, "Ranks", "Of the non-DiT ranks, those that only decode (with --enable-disagg).", minimum=1
    )
    sp_degree: int = flag(1, "Ranks", "Sequence parallel ranks per DiT replica; alone: Ulysses.", minimum=1)
    ulysses_degree: int | None = flag(
        None, "Ranks", "Of the sequence parallel ranks, those that split by attention heads (Ulysses).", minimum=1
    )
    ring_degree: int | None = flag(
        None, "Ranks", "Of the sequence parallel ranks, those that split keys and values (ring attention).", minimum=1
    )
    tp_size: int = flag(1, "Ranks", "Tensor parallel ranks per DiT replica.", minimum=1)
    cfg_parallel_degree: int = flag(
        1, "Ranks", "2: the prompt and the negative prompt of a step on two ranks.", minimum=1, maximum=2
    )

    use_async_comm: bool = flag(
        True, "Transfer", "Overlap stages and transfers; false: lock-step, one request at a time (the baseline)."
    )
    transfer_backend: str = flag(
        "auto",
        "Transfer",
        "How tensors cross edges; auto: CUDA IPC where two GPUs reach each other's memory, else torch (NCCL, gloo).",
        choices=("auto", "torch", "cuda_ipc"),
    )
    max_pending_transfers: int = flag(2, "Transfer", "Payloads on the way or waiting, per edge.", minimum=1)
    max_pending_bytes: int = flag(
        1 << 30,
        "Transfer",
        "Bytes on the way or waiting, per edge (512MiB, 1GiB, ...).",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    verify_transfers: bool = flag(False, "Transfer", "Check a CRC-32 of every payload (for debugging).")

    api_key: str | None = flag(
        None,
        "Server",
        "Key that clients send as a bearer token, or in x-api-key or api-key; better set in "
        f"{API_KEY_VARIABLE}, where no process list shows it.",
        metavar="KEY",
        secret=True,
    )
    allow_remote_media: str | None = flag(
        None,
        "Server",
        "Hosts (HOST,HOST:PORT,...) whose pictures a request may name by address, never in a private network; "
        "none where it isn't given.",
        metavar="HOSTS",
        is_list=True,
    )
    default_response_format: str = flag(
        "b64_json",
        "Server",
        "What an answer holds of a picture where the request doesn't say: the file (b64_json) or its address (url).",
        choices=("b64_json", "url"),
    )
    extra_fields: str = flag(
        "refuse",
        "Server",
        "What happens to a request with a field that is not known; ignore: it is left out, and warnings says so.",
        choices=("refuse", "ignore"),
    )
    otlp_endpoint: str | None = flag(
        None,
        "Server",
        f"OTLP/HTTP address that traces are sent to (http://localhost:4318); {OTLP_VARIABLE} where it isn't given.",
        metavar="URL",
    )
    log_level: str = flag("info", "Server", "Least level logged.", choices=("debug", "info", "warning", "error"))
    trace: str | None = flag(
        None,
        "Server",
        "Write a timeline of the run at its end: this file for ui.perfetto.dev, and .html and .png beside it.",
        metavar="FILE.json",
        suffix=".json",
    )

    output_dir: str = flag(
        "outputs", "Jobs", "Folder of the videos and of the job store; one server at a time.", metavar="FOLDER"
    )
    job_store: str | None = flag(
        None,
        "Jobs",
        "SQLAlchemy URL of a database for this server's jobs; SQLite in --output-dir where it isn't given.",
        metavar="URL",
        secret=True,
    )
    max_jobs: int = flag(10_000, "Jobs", "Videos that may be queued; past it a request is refused.", minimum=1)
    job_retention: float = flag(
        7 * 24 * 3600.0, "Jobs", "For a video and its job to be kept after its end.", above=0, metavar="SECONDS"
    )
    max_output_bytes: int = flag(
        100 << 30,
        "Jobs",
        "Bytes of all videos kept; past it the oldest go. And of the pictures that queued ones start from; past it a "
        "request is refused.",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )

    max_queue: int = flag(256, "Limits", "Requests that may wait; past it a request is refused.", minimum=1)
    max_request_bytes: int = flag(
        1 << 20, "Limits", "Bytes of one request's body.", minimum=1, metavar="BYTES", is_bytes=True
    )
    max_total_bytes: int = flag(
        256 << 20,
        "Limits",
        "Bytes of all requests' bodies and of what is fetched for them at a time.",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    max_upload_bytes: int = flag(
        32 << 20,
        "Limits",
        "Bytes of one request's body where it may hold a picture (edits, videos).",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    max_json_bytes: int = flag(
        512 << 10,
        "Limits",
        "Bytes of a JSON body outside of its strings; a list or an object counts for 32.",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    max_client_bytes: int | None = flag(
        None,
        "Limits",
        "Of --max-total-bytes, the share of one client address; three quarters where it isn't given.",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    min_body_rate: int = flag(
        4 << 10,
        "Limits",
        "Bytes a second at which a body must come. One that has lagged behind for --body-timeout is refused; for two "
        "seconds, where others need its place.",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    body_timeout: float = seconds(30.0, "For a body to stand still, or to lag behind --min-body-rate.")
    max_connections: int = flag(
        1000,
        "Limits",
        "Connections of clients at a time; fewer where there are not three file descriptors for each. Past it the one "
        "that has been idle for longest goes.",
        minimum=1,
    )
    header_timeout: float = seconds(30.0, "For a connection to be without a request.")
    write_timeout: float = seconds(30.0, "For a client to read the 64 KiB of an answer that lie ready for it.")
    max_unsent_bytes: int = flag(
        256 << 20,
        "Limits",
        "Bytes of all answers that their clients have not read yet; past it the slowest reader is cut off.",
        minimum=1,
        metavar="BYTES",
        is_bytes=True,
    )
    max_attempts: int = flag(
        3, "Limits", "Times a request is tried when its worker dies or its transfer fails.", minimum=1
    )
    checkpoint_steps: int = flag(
        0,
        "Limits",
        "Steps between two checkpoints of a denoise on disk, where it goes on when its worker dies; 0: it starts over.",
        minimum=0,
    )
    dist_timeout: float = seconds(
        60.0,
        "For one transfer or edge set-up. A rank without heartbeats has 0.8 of it (3 to 30 s).",
    )
    stage_timeout: float = seconds(
        600.0, "For a stage without progress; once it is measured, ten times that and at least --dist-timeout."
    )
    request_timeout: float = seconds(
        3600.0, "For a request, from submission to end; for a video only the time that it is computed."
    )
    startup_timeout: float = seconds(600.0, "For the workers to start and load the model.")
    drain_timeout: float = seconds(30.0, "After the first SIGTERM, for the requests that run to end.")

    @settings_as_fields()
    def __post_init__(self) -> None:
        for each in server_flags():
            object.__setattr__(self, each.name, each.check(getattr(self, each.name)))
        self.check_http()
        # Given by the other two, it is their product from here on.
        object.__setattr__(self, "sp_degree", math.prod(check_ranks(self)))
        if not all(self.model_names):
            allowed = "a name, or several with commas: a,b"
            raise ConfigError("--served-model-name", f"{self.served_model_name!r} is not allowed; allowed: {allowed}")
        for host in self.media_hosts:
            if not _HOST.fullmatch(host):
                reason = f"{host!r} is no host; allowed: a.example, a.example:8080, several with commas"
                raise ConfigError("--allow-remote-media", reason)
        if self.max_total_bytes < self.max_request_bytes:
            raise ConfigError(
                "--max-total-bytes",
                f"{self.max_total_bytes} is less than --max-request-bytes; allowed: at least {self.max_request_bytes}",
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """The model's names in the HTTP API."""
        if self.served_model_name is None:
            return (self.model_path,)
        return tuple(dict.fromkeys(name.strip() for name in self.served_model_name.split(",")))

    @property
    def model_name(self) -> str:
        """That of its names which answers have."""
        return self.model_names[0]

    def client_key(self) -> str | None:
        """The key that clients must send: ``api_key``, else the environment's; ``None`` where neither is set.

        Raises:
            ConfigError: the environment has a blank one, which would leave a server open that was meant closed.
        """
        if self.api_key is not None or (key := os.environ.get(API_KEY_VARIABLE)) is None:
            return self.api_key
        if not key.strip():
            raise ConfigError(API_KEY_VARIABLE, "it is set and empty; give it a key, or unset it")
        return key

    def traces_url(self) -> str | None:
        """Where traces are posted: ``otlp_endpoint``, else OpenTelemetry's variables; ``None`` where none is set.

        Raises:
            ConfigError: it is no http or https address.
        """
        exact = os.environ.get(OTLP_TRACES_VARIABLE)
        base = self.otlp_endpoint or (None if exact else os.environ.get(OTLP_VARIABLE))
        url = f"{base.rstrip('/')}/v1/traces" if base else exact or None
        if url is not None and not url.startswith(("http://", "https://")):
            name = "--otlp-endpoint" if self.otlp_endpoint else OTLP_TRACES_VARIABLE if exact else OTLP_VARIABLE
            raise ConfigError(name, f"{base or exact!r} is no address; allowed: http://HOST:PORT, https://HOST:PORT")
        return url

    @property
    def largest_body(self) -> int:
        """Bytes of one request's body, wherever it goes: ``max_upload_bytes`` where all can hold it."""
        return max(self.max_request_bytes, min(self.max_upload_bytes, self.max_total_bytes))

    @property
    def client_share(self) -> int:
        """``max_client_bytes``, or what it is where it isn't given; one body always fits."""
        return max(self.max_client_bytes or self.max_total_bytes * 3 // 4, self.largest_body)

    @property
    def media_hosts(self) -> tuple[str, ...]:
        """``allow_remote_media``, one by one, in lower case."""
        return tuple(host.strip().lower() for host in (self.allow_remote_media or "").split(",") if host.strip())

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


@cache
def server_flags() -> tuple[Flag, ...]:
    """Every field of ``ServerArgs`` as a flag, by group, in the order of the fields."""
    hints = typing.get_type_hints(ServerArgs)
    flags = [as_flag(field, hints[field.name]) for field in dataclasses.fields(ServerArgs)]
    return tuple(sorted(flags, key=lambda each: _GROUPS.index(each.spec.group)))
