"""What every training here shares: a wall-clock budget over several commands, EMA, the best weights, save and resume.

Progress runs from 0 to 1 in seconds of training (compiling and preparing don't count), and the learning rate follows
the progress, so that a resumed run goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.train_emoji.optimizers import Optimizer

UNCOUNTED_STEPS = 10
"""The first steps of a command compile; the clock starts after them."""
SYNC_EVERY = 10


def shared_arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every command that trains is asked for."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the file that prepare.py wrote")
    add("--work", type=Path, required=True, help="folder for state, log and model")
    add("--seed", type=int, default=0, help="of the scenes or clips; another one per command shows more of them")
    add("--rate", type=float, default=1e-3, help="peak learning rate")
    add("--emoji", type=int, default=0, help="only so many emoji, for trials")
    add("--no-compile", action="store_true")
    add("--no-samples", action="store_true")
    return parser


def training_arguments(description: str) -> argparse.ArgumentParser:
    """The same for the training of a whole model, which a later command with the same ``--work`` goes on with."""
    parser = shared_arguments(description)
    parser.add_argument("--vae-rate", type=float, default=1.2e-3)
    finish = "spread what is left of the schedule over this command, whatever it is"
    parser.add_argument("--finish", action="store_true", help=finish)
    return parser


def open_device(seed: int) -> torch.device:
    """The GPU, else the CPU, set up for speed; random numbers start at ``seed``."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # What can't be compiled runs as it is: slower, but a rented GPU's hour isn't lost.
    torch._dynamo.config.suppress_errors = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Journal:
    """Progress for people on standard output, and for programs as JSON lines in ``log.jsonl`` of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.started = time.monotonic()
        self._path = folder / "log.jsonl" if folder else None

    def write(self, event: str, **figures: float | int | str) -> None:
        """One line: what happened and its figures."""
        seconds = time.monotonic() - self.started
        shown = " ".join(f"{name} {_short(value)}" for name, value in figures.items())
        sys.stdout.write(f"[{seconds:6.1f}s] {event} {shown}\n")
        sys.stdout.flush()
        if self._path:
            with self._path.open("a") as log:
                log.write(json.dumps({"seconds": round(seconds, 1), "event": event, **figures}) + "\n")


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Command:
    """One command of a training: its settings (``shared_arguments`` and more), where it runs, and its log."""

    args: argparse.Namespace
    device: torch.device
    journal: Journal

    @property
    def work(self) -> Path:
        """The folder that outlives the command."""
        folder: Path = self.args.work
        return folder

    @property
    def compiled(self) -> bool:
        """Whether training steps are compiled."""
        return self.device.type == "cuda" and not self.args.no_compile


@dataclass(frozen=True)
class Schedule:
    """Learning rate over progress: a linear rise, the peak held, then a cosine down to nearly nothing."""

    peak: float
    warmup: float = 0.02
    flat_until: float = 0.3
    floor: float = 0.002

    def rate(self, progress: float) -> float:
        """The learning rate at a progress of 0..1."""
        if progress < self.warmup:
            return self.peak * max(progress / self.warmup, 0.01)
        fall = min(1.0, max(0.0, (progress - self.flat_until) / (1 - self.flat_until)))
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * fall)))


@dataclass(frozen=True)
class Budget:
    """How long this command may train.

    ``total_seconds`` is what the whole training takes over all commands; ``deadline`` (time.monotonic) stops this one.
    With ``finish`` the rest of the schedule is spread over the time to the deadline instead.
    """

    total_seconds: float
    deadline: float
    finish: bool = False

    def slope(self, progress: float, now: float) -> float:
        """Progress per second from now on."""
        if self.finish:
            return (1 - progress) / max(1e-3, self.deadline - now)
        return 1 / self.total_seconds


@dataclass(frozen=True)
class Options:
    """How a training steps and how often it looks at itself (seconds)."""

    schedule: Schedule
    clip: float = 1.0
    ema_decay: float = 0.999
    report_every: float = 15.0
    validate_every: float = 30.0
    diverged_above: float = 3.0
    """A training loss this many times its least one sends the training back to its best weights at half the rate.

    The loss of the EMA would not do: early on the weights move fast, and their mean is worse than any of them.
    """


class Ema:
    """A running mean of parameters; ``swap`` exchanges the two, so twice changes nothing."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self.means = [p.detach().clone() for p in parameters]
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters after ``step`` steps in; early ones weigh more."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the means into the model and the model's values here."""
        current = [p.detach().clone() for p in self._parameters]
        torch._foreach_copy_(self._parameters, self.means)
        torch._foreach_copy_(self.means, current)


class Trainer:
    """Trains the parameters of ``modules`` that require gradients, with its state in a folder of its own."""

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        options: Options,
        folder: Path,
        journal: Journal,
    ) -> None:
        self.name, self.options, self.folder, self.journal = name, options, folder, journal
        self.parameters: dict[str, nn.Parameter] = {
            f"{part}.{key}": p for part, m in modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.ema = Ema(list(self.parameters.values()), options.ema_decay)
        self.optimizer = Optimizer(self.parameters)
        self.steps = 0
        self.progress = 0.0
        self.best_loss = math.inf
        self.rate_scale = 1.0

    @property
    def done(self) -> bool:
        """Whether the schedule has run out."""
        return self.progress >= 1

    def run(self, step_loss: Callable[[], Tensor], validate: Callable[[], float], budget: Budget) -> None:
        """Steps until the schedule or the time is over, then saves; ``validate`` finds the EMA in the model.

        The weights that it starts with count among the best. Raises ``RuntimeError`` if they give no finite loss.
        """
        if not math.isfinite(self.best_loss):
            self._validate(validate)
        if not math.isfinite(self.best_loss):
            raise RuntimeError(f"the loss of {self.name} isn't finite before its first step; look at --start and data")
        started = time.monotonic()
        first, at_start, slope = self.steps, self.progress, 0.0
        reported = validated = started
        mean_loss, least = math.nan, math.inf
        while not self.done and time.monotonic() < budget.deadline:
            loss = self._step(step_loss)
            here = self.steps - first
            if here % SYNC_EVERY and here != UNCOUNTED_STEPS:
                continue
            # Reading the loss waits for the device: without it the clock would run ahead of the work.
            value = loss.item()
            now = time.monotonic()
            mean_loss = value if math.isnan(mean_loss) else 0.8 * mean_loss + 0.2 * value
            if here == UNCOUNTED_STEPS:
                self.journal.write(f"{self.name}: first steps", took=now - started)
                started = now
                slope = budget.slope(at_start, now)
            elif here > UNCOUNTED_STEPS:
                self.progress = min(1.0, at_start + (now - started) * slope)
            if now - reported >= self.options.report_every:
                reported = now
                self._report(mean_loss, (here - UNCOUNTED_STEPS) / max(1e-3, now - started))
            least = min(least, mean_loss)
            if now - validated >= self.options.validate_every:
                self._validate(validate)
                if not mean_loss < self.options.diverged_above * least:
                    self._return_to_best()
                    mean_loss, least = math.nan, math.inf
                validated = time.monotonic()
        self._validate(validate)
        self.save()

    def _step(self, step_loss: Callable[[], Tensor]) -> Tensor:
        loss = step_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip, foreach=True)
        self.optimizer.step(self.rate_scale * self.options.schedule.rate(self.progress))
        self.steps += 1
        self.ema.update(self.steps)
        return loss.detach()

    def _report(self, loss: float, steps_per_second: float) -> None:
        rate = self.rate_scale * self.options.schedule.rate(self.progress)
        self.journal.write(
            f"{self.name}:", step=self.steps, loss=loss, rate=rate, progress=self.progress, per_second=steps_per_second
        )

    def _validate(self, validate: Callable[[], float]) -> None:
        """Measures the EMA and keeps it if it is the best so far."""
        self.ema.swap()
        with torch.no_grad():
            loss = validate()
        if loss < self.best_loss:
            self.best_loss = loss
            self._write("best.safetensors", self.parameters)
        self.ema.swap()
        self.journal.write(f"{self.name}: validation", step=self.steps, loss=loss, best=self.best_loss)

    def _return_to_best(self) -> None:
        self.journal.write(f"{self.name}: diverged; back to the best weights at half the rate", step=self.steps)
        self.use_best()
        with torch.no_grad():
            torch._foreach_copy_(self.ema.means, [p.detach() for p in self.parameters.values()])
        self.optimizer.forget()
        self.rate_scale /= 2

    def use_best(self) -> None:
        """Puts the best EMA weights of any validation so far into the modules."""
        with torch.no_grad():
            for name, tensor in load_file(self.folder / "best.safetensors").items():
                self.parameters[name].copy_(tensor)

    def save(self) -> None:
        """Writes everything that ``resume`` needs."""
        means = zip(self.parameters, self.ema.means, strict=True)
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": mean for name, mean in means}
        self._write("state.safetensors", tensors | self.optimizer.tensors())
        figures = {
            "steps": self.steps,
            "progress": self.progress,
            "best_loss": self.best_loss,
            "rate_scale": self.rate_scale,
        }
        (self.folder / "state.json").write_text(json.dumps(figures))

    def resume(self) -> bool:
        """Goes on from what ``save`` wrote to the folder; False if there is nothing."""
        if not (self.folder / "state.json").exists():
            return False
        figures = json.loads((self.folder / "state.json").read_text())
        self.steps, self.progress = figures["steps"], figures["progress"]
        self.best_loss, self.rate_scale = figures["best_loss"], figures["rate_scale"]
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for (name, parameter), mean in zip(self.parameters.items(), self.ema.means, strict=True):
                parameter.copy_(tensors[f"weight.{name}"])
                mean.copy_(tensors[f"ema.{name}"])
        self.optimizer.load(tensors)
        self.journal.write(f"{self.name}: resumed", step=self.steps, progress=self.progress, best=self.best_loss)
        return True

    def _write(self, file_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the file in one go, so that a command cut short leaves the last complete one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{file_name}.part"
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, unfinished)
        os.replace(unfinished, self.folder / file_name)
