"""The three stages on one device, without transfers: ours against stock diffusers, eager, compiled, offloaded.

Ours and stock denoise with the same transformer, in turns, in one process: what differs is the code around it. A
denoise begins when the prompt is encoded and ends with the latents; its *steps* begin with the transformer's first
forward, and what lies between is *before*. On a GPU times are those of CUDA events.

    python benchmarks/stages.py --workload flux-schnell --variants eager,compiled,offloaded --json FILE
    python benchmarks/stages.py --report FILE...
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section
from serving_engine import sampling_params
from serving_models import build_stock_pipeline, model_path
from serving_stock import call_of
from serving_workloads import WORKLOADS, Workload

from ditrelay import ServerArgs
from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.pixels import to_frames
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import Role

if TYPE_CHECKING:
    import numpy.typing as npt

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "eager": {},
    "compiled": {"torch_compile": True},
    "offloaded": {"offload": frozenset({"dit"})},
}
GIB = 1 << 30
WINDOW = ServerArgs().max_pending_transfers
HEADER = (
    "denoise",
    "before ms",
    "step ms",
    "min",
    "max",
    "of stock eager's step",
    "pixels off by, mean / max",
    "weights + activations GiB",
)


class Clock:
    """Moments on one device: CUDA events, which hold nothing up; on a CPU the process's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        self._marks = []
        self.mark()

    def mark(self) -> None:
        mark: Any = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        self._marks.append(mark)

    def read(self) -> list[float]:
        """Seconds from the start to each mark after it; the device must come to the last one."""
        first, *others = self._marks
        if not self._cuda:
            return [mark - first for mark in others]
        others[-1].synchronize()
        return [first.elapsed_time(mark) / 1000 for mark in others]


@dataclass
class Denoises:
    """Seconds of several denoises of one kind."""

    before: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def add(self, marks: Sequence[float], steps: int) -> None:
        """``marks``: when each forward began, and the end."""
        self.before.append(marks[0])
        self.step.append((marks[-1] - marks[0]) / steps)

    def figures(self) -> dict[str, float]:
        """In milliseconds; the first is left out."""
        before, step = ([1000 * each for each in seconds[1:]] for seconds in (self.before, self.step))
        return {
            "runs": len(step),
            "before": statistics.median(before),
            "step": statistics.median(step),
            "min": min(step),
            "max": max(step),
        }


class Bench:
    """One workload on one device. ``figures`` is what is known so far."""

    def __init__(self, workload: Workload, model: str, device: torch.device, rounds: int) -> None:
        self._workload, self._model, self._device, self._rounds = workload, model, device, rounds
        self._card = load_card(model, workload.load_format)
        self._params = self._card.resolve(sampling_params(workload, 0, None))
        self._requests = [Request(request_id="r", params=self._params)]
        self._clock = Clock(device)
        self._stock_frames: Any = None
        self.figures: dict[str, Any] = {"workload": asdict(workload) | {"dtype": workload.dtype}, "denoise": {}}

    def run(self, variants: Sequence[str]) -> None:
        conditioning = self._encode()
        latents = {name: self._denoise(name, conditioning) for name in variants}
        self.figures["bytes"] = {"conditioning": nbytes(conditioning), "latents": nbytes(latents[variants[0]])}
        decoder: Any = self._load("decode")
        self._stage("decode", lambda: decoder.decode(self._requests, latents[variants[0]]))
        for name, state in latents.items():
            seen, frames = self.figures["denoise"][name], decoder.decode(self._requests, state)[0]
            seen["difference"] = difference(frames, self._stock_frames)

    def _encode(self) -> State:
        adapter = self._load("encode")
        conditioning: State = self._stage("encode", lambda: adapter.encode(self._requests))
        return conditioning

    def _load(self, role: Role, **changes: Any) -> Any:
        self._forget()
        spec = LoadSpec(
            card=self._card,
            roles=frozenset({role}),
            device=str(self._device),
            dtype=self._workload.dtype,
            load_format=self._workload.load_format,
        )
        return load_adapter(replace(spec, **changes))

    def _stage(self, name: str, stage: Callable[[], Any]) -> Any:
        seconds, weights, result = [], self._allocated(), None
        self._reset_peak()
        for _ in range(self._rounds + 1):
            self._clock.start()
            result = stage()
            self._clock.mark()
            seconds.append(self._clock.read()[-1])
        self.figures[name] = {
            "ms": 1000 * statistics.median(seconds[1:]),
            "weights": weights,
            "peak": self._peak(),
        }
        print(f"{name}: {self.figures[name]}", flush=True)
        return result

    def _denoise(self, name: str, conditioning: State) -> State:
        """Measure one variant; its latents."""
        adapter = self._load("denoise", **VARIANTS[name])
        transformer = adapter.component("transformer")
        transformer.register_forward_pre_hook(lambda *_: self._clock.mark())
        weights, began = self._allocated(), time.monotonic()
        self._reset_peak()
        ours, stock = Denoises(), Denoises()
        state = self._ours(adapter, conditioning, ours)
        figures: dict[str, Any] = {"first_seconds": time.monotonic() - began, "weights": weights, "peak": self._peak()}
        pipeline = None if name == "offloaded" else self._stock_around(transformer)
        for _ in range(self._rounds):
            state = self._ours(adapter, conditioning, ours)
            if pipeline is not None:
                self._stock(pipeline, stock)
        figures["ours"] = ours.figures()
        if pipeline is not None:
            figures["stock"] = stock.figures()
            if self._stock_frames is None:
                self._stock_frames = self._draw(pipeline)
        self.figures["denoise"][name] = figures
        print(f"{name}: {figures}", flush=True)
        return state

    def _stock_around(self, transformer: Any) -> Any:
        return build_stock_pipeline(
            self._model,
            device=str(self._device),
            dtype=self._workload.dtype,
            load_format=self._workload.load_format,
            given={"transformer": transformer},
        )

    def _ours(self, adapter: Any, conditioning: State, seen: Denoises) -> State:
        self._clock.start()
        session = adapter.begin(self._requests, conditioning)
        while adapter.step(session):
            pass
        state: State = adapter.finish(session)
        self._clock.mark()
        seen.add(self._clock.read(), session.total_steps)
        return state

    def _stock(self, pipeline: Any, seen: Denoises) -> None:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            encoded = type(pipeline).encode_prompt(pipeline, *args, **kwargs)
            self._clock.start()
            return encoded

        pipeline.encode_prompt = encode_prompt
        self._call(pipeline, "latent")
        self._clock.mark()
        assert self._params.num_inference_steps is not None
        seen.add(self._clock.read(), self._params.num_inference_steps)

    def _draw(self, pipeline: Any) -> npt.NDArray[np.uint8]:
        """The stock pipeline's frames, uint8 [frames, height, width, 3]."""
        output = self._call(pipeline, "pt")
        return to_frames(output.frames[0] if self._workload.is_video else output.images[0])

    def _call(self, pipeline: Any, output_type: str) -> Any:
        assert self._params.seed is not None
        return pipeline(
            prompt=self._params.prompt,
            num_inference_steps=self._params.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(self._params.seed),
            output_type=output_type,
            **call_of(self._workload),
        )

    # ------------------------------------------------------------ memory, in bytes; 0 on a CPU

    def _forget(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0


def nbytes(state: State) -> int:
    """Bytes of all tensors of a payload."""
    values = [each.value for each in state.values()]
    tensors = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def difference(ours: npt.NDArray[np.uint8], stock: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Between two pictures of one size, in steps of 256."""
    apart = np.abs(ours.astype(np.int16) - stock.astype(np.int16))
    return {"mean": float(apart.mean()), "max": float(apart.max())}


# ---------------------------------------------------------------- what is shown


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    denoise = figures["denoise"]
    reference = denoise.get("eager", {}).get("stock", {}).get("step")
    found = []
    for variant, seen in denoise.items():
        for who in ("stock", "ours"):
            if who in seen:
                found.append([f"{who}, {variant}", *_row(seen, who, reference)])
    return found


def _row(seen: Mapping[str, Any], who: str, reference: float | None) -> list[str]:
    each = seen[who]
    share = f"{each['step'] / reference:.3f}" if reference else "-"
    apart = f"{seen['difference']['mean']:.2f} / {seen['difference']['max']:.0f}" if who == "ours" else "-"
    peak = f"{seen['peak'] / GIB:.2f}" if who == "ours" and seen["peak"] else "-"
    return [*(f"{each[key]:.1f}" for key in ("before", "step", "min", "max")), share, apart, peak]


def section(figures: Mapping[str, Any], served: Sequence[Mapping[str, Any]]) -> str:
    """One workload as Markdown, with the memory of DiT ranks in serving runs of the same workload beside the floor."""
    workload, source = figures["workload"], figures["provenance"]
    lines = [
        f"### {workload['name']}, one device",
        f"{origin(source, where=''.join(source['gpus'][:1]), packages=('torch',))}.",
        markdown(HEADER, rows(figures)),
        ", ".join(_stage_line(name, figures[name]) for name in ("encode", "decode")) + ".",
    ]
    same = [each for each in served if each["workload"]["name"] == workload["name"] and "bytes" in figures]
    lines += [line for each in same for line in _memory(figures, each)]
    return "\n\n".join(lines)


def _memory(figures: Mapping[str, Any], served: Mapping[str, Any]) -> Iterator[str]:
    """Peak memory of DiT ranks that denoise alone, against weights + activations + windows."""
    bare = figures["denoise"]["eager"]["peak"]
    for record in served["systems"]:
        peaks = [rank["peak"] for rank in record.get("memory", []) if rank["role"] == "dit"]
        if not peaks or record["sp"] > 1:
            continue
        window = WINDOW * record["non_dit"] * sum(figures["bytes"].values())
        floor = bare + window
        yield (
            f"A DiT rank of {record['name']} in the serving run peaked at {max(peaks) / GIB:.2f} GiB: "
            f"{max(peaks) / floor - 1:+.1%} against weights + activations + windows ({bare / GIB:.2f} GiB + "
            f"{window / 1e6:.0f} MB); aim within 5%."
        )


def _stage_line(name: str, seen: Mapping[str, float]) -> str:
    memory = f" (weights {seen['weights'] / GIB:.2f}, peak {seen['peak'] / GIB:.2f} GiB)" if seen["peak"] else ""
    return f"{name} {seen['ms']:.1f} ms{memory}"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--workload", choices=sorted(WORKLOADS), default="tiny-flux")
    arguments.add_argument("--variants", default="eager,compiled", help=f"of {', '.join(VARIANTS)}")
    arguments.add_argument("--device", help="in place of the workload's")
    arguments.add_argument("--rounds", type=int, default=3, help="counted runs of each (3)")
    arguments.add_argument("--steps", type=int, help="in place of the workload's")
    arguments.add_argument("--commit", help="for the provenance, where there is no git repository")
    arguments.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="write docs/performance.md from these"
    )
    arguments.add_argument("--serving", type=Path, nargs="+", default=[], metavar="FILE", help="its serving results")
    given = arguments.parse_args()
    if given.report:
        served = [json.loads(file.read_text()) for file in given.serving]
        text = "\n\n".join(section(json.loads(file.read_text()), served) for file in given.report)
        write_section(ROOT / "docs" / "performance.md", "stages", text)
        return 0
    workload = WORKLOADS[given.workload]
    workload = replace(workload, steps=given.steps or workload.steps, device=given.device or workload.device)
    with tempfile.TemporaryDirectory(prefix="stages-") as folder:
        bench = Bench(workload, model_path(workload, Path(folder)), torch.device(workload.device), given.rounds)
        with torch.no_grad():
            bench.run(given.variants.split(","))
    result = {"provenance": provenance() | ({"commit": given.commit} if given.commit else {}), **bench.figures}
    write_json(given.json, result)
    show(f"{workload.name} on one device", HEADER, rows(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
