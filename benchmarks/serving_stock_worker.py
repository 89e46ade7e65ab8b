"""One process with a stock diffusers pipeline. No code of ditrelay between a request and its pixels.

It is given every fair advantage: pixels become uint8 on the device, and the file is made by a thread beside the next
request. Its stages are timed by CUDA events (on a CPU by the clock), which hold nothing up.
"""

from __future__ import annotations

import multiprocessing
import queue
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

GROUP_TIMEOUT = timedelta(seconds=120)
IDLE_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    seq: int
    prompt: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class StockSpec:
    """What one worker is. ``world`` > 1: one pipeline over so many ranks, which meet at the file ``meeting``.

    ``any_length``: Ulysses for sequences that the number of ranks does not divide.
    """

    rank: int
    world: int
    meeting: str
    model: str
    load_format: str
    device: str
    dtype: str
    call: tuple[tuple[str, Any], ...]
    is_video: bool
    any_length: bool
    compiled: bool
    warm_up_steps: int


def run_stock(spec: StockSpec, tasks: Any, results: Any) -> None:
    """The process's entry point. Says that it is ready, then serves until it is terminated or its parent is gone."""
    try:
        worker = StockWorker(spec, results)
        worker.draw(Task(0, "warm-up", spec.warm_up_steps))
        results.put({"rank": spec.rank, **worker.memory()})
        while (parent := multiprocessing.parent_process()) is None or parent.is_alive():
            with suppress(queue.Empty):
                worker.serve(tasks.get(timeout=IDLE_SECONDS))
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        results.put({"rank": spec.rank, "failed": f"{type(error).__name__}: {first}"})
        results.close()
        results.join_thread()
        raise


class StockWorker:
    """A pipeline on one device, and the thread that makes files."""

    def __init__(self, spec: StockSpec, results: Any) -> None:
        import torch
        from serving_models import build_stock_pipeline

        self._torch = torch
        self._spec, self._results = spec, results
        self._device = torch.device("cpu") if spec.device == "cpu" else torch.device("cuda", spec.rank)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(1)
        self._pipeline: Any = build_stock_pipeline(
            spec.model, device=str(self._device), dtype=spec.dtype, load_format=spec.load_format
        )
        if spec.world > 1:
            self._spread()
        if spec.compiled:
            self._pipeline.transformer.compile_repeated_blocks()
        self._clock = StageClock(self._pipeline, self._device)
        self._files = ThreadPoolExecutor(1, thread_name_prefix="files")

    def _spread(self) -> None:
        """diffusers' context parallelism over all ranks; every rank then runs the whole call on the same requests."""
        import torch.distributed as dist
        from diffusers import ContextParallelConfig

        spec, torch = self._spec, self._torch
        dist.init_process_group(
            "gloo" if self._device.type == "cpu" else "nccl",
            init_method=f"file://{spec.meeting}",
            rank=spec.rank,
            world_size=spec.world,
            timeout=GROUP_TIMEOUT,
        )
        if self._device.type == "cpu":  # diffusers divides by the number of accelerators, which is 0 here
            torch.accelerator.device_count = lambda: 1
        config = ContextParallelConfig(ulysses_degree=spec.world, ulysses_anything=spec.any_length)
        self._pipeline.transformer.enable_parallelism(config=config)

    def serve(self, task: Task) -> None:
        frames = self.draw(task)
        stages, denoise = self._clock.read()
        if self._spec.world > 1 and self._spec.rank > 0:
            self._results.put({"rank": self._spec.rank, **self.memory()})
            return
        message = {"rank": self._spec.rank, "seq": task.seq, "stages": stages, "denoise": denoise, **self.memory()}
        self._files.submit(self._finish, frames, message)

    def _finish(self, frames: Any, message: dict[str, Any]) -> None:
        from ditrelay.runtime.pipelines_core.media import encode_media  # the same file as ditrelay's, at the same cost

        try:
            media = encode_media(frames, fps=16 if self._spec.is_video else 0)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            self._results.put({"rank": self._spec.rank, "failed": f"making the file failed: {error}"})
        else:
            self._results.put(message | {"media": media.data})

    def draw(self, task: Task) -> Any:
        """uint8 [frames, height, width, 3] in host memory."""
        torch = self._torch
        self._clock.start()
        output = self._pipeline(
            prompt=task.prompt,
            num_inference_steps=task.steps,
            generator=torch.Generator("cpu").manual_seed(task.seq),
            output_type="pt",
            **dict(self._spec.call),
        )
        pixels = output.frames[0] if self._spec.is_video else output.images
        self._clock.stop()
        return (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()

    def memory(self) -> dict[str, int]:
        if self._device.type == "cuda":
            cuda = self._torch.cuda
            return {"peak": cuda.max_memory_allocated(), "allocated": cuda.memory_allocated()}
        with open("/proc/self/statm") as statm:
            rss = int(statm.read().split()[1]) * resource.getpagesize()
        return {"peak": rss, "allocated": rss}


class StageClock:
    """When the prompt is encoded and the VAE's decode begins. ``read`` once the pixels are in host memory.

    A denoise begins, as ours does, with all that is to be prepared for it.
    """

    def __init__(self, pipeline: Any, device: Any) -> None:
        self._cuda = device.type == "cuda"
        self._began = 0.0
        self._marks: list[Any] = []
        pipeline.encode_prompt = self._marking(pipeline.encode_prompt, before=None, after=1)
        pipeline.vae.decode = self._marking(pipeline.vae.decode, before=2, after=None)

    def start(self) -> None:
        self._marks = []
        self._began = time.monotonic()
        self._mark(expected=0)

    def stop(self) -> None:
        self._mark(expected=3)

    def read(self) -> tuple[dict[str, float], tuple[float, float]]:
        """(seconds per stage, begin and end of the denoise in monotonic seconds)."""
        at = [self._seconds(mark) for mark in self._marks]
        stages = {"encode": at[1] - at[0], "denoise": at[2] - at[1], "decode": at[3] - at[2]}
        return stages, (self._began + at[1], self._began + at[2])

    def _marking(self, call: Callable[..., Any], *, before: int | None, after: int | None) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._mark(before)
            result = call(*args, **kwargs)
            self._mark(after)
            return result

        return marked

    def _mark(self, expected: int | None) -> None:
        """Take mark number ``expected`` where it is the next: later calls within a request don't count."""
        if len(self._marks) == expected:
            if self._cuda:
                import torch

                mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                mark.record()
                self._marks.append(mark)
            else:
                self._marks.append(time.monotonic())

    def _seconds(self, mark: Any) -> float:
        seconds: float = self._marks[0].elapsed_time(mark) / 1000 if self._cuda else mark - self._began
        return seconds
