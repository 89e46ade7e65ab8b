"""A denoise spread over GPUs, through the whole engine: the pictures of one rank.

All engines that the chosen tests need are started side by side, since a start takes seconds and the models are tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from rig import ON_GPUS, SECONDS, Pixels, Record, at_rest, distance, draw, needs, pixels, reaches_step, settings

from ditrelay import Engine, SamplingParams
from ditrelay.errors import RequestCancelled

AT_ONCE = 6 if ON_GPUS else 2
# Of 256, root mean square: what float32 may differ by. The VAE's convolutions on a GPU round to TF32.
LEVELS = 0.15 if ON_GPUS else 0.05
LEVELS_IN_BFLOAT16 = 1.5  # its 8 bits are a third of a level at white; seen: 0.76 for every way to spread a denoise
PROMPTS = ("a red apple " * 40, "two dogs on a blue road " * 20, "a yellow car")


def flux_6_heads() -> Any:
    """Heads that three ranks can share out, and attention that weighs enough for a wrong one to show in bfloat16."""
    pipeline = tiny_models.flux(heads=6)
    for name, parameter in pipeline.transformer.named_parameters():
        if name.endswith(("to_v.weight", "add_v_proj.weight")):
            parameter.data *= 10
    return pipeline


VARIANTS = {"flux-6-heads": flux_6_heads}


@dataclass(frozen=True)
class Case:
    """One way to spread one model's denoise. ``ranks``: all of them; the last one encodes and decodes, or all do."""

    model: str
    dtype: str
    ranks: int = 1
    apart: bool = False
    sp: int = 1
    ring: int = 1
    tp: int = 1
    cfg: int = 1
    compiled: bool = False

    def __str__(self) -> str:
        degrees = {"ulysses": self.sp // self.ring, "ring": self.ring, "tp": self.tp, "cfg": self.cfg}
        words = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        place = f"1+{self.ranks - 1}" if self.apart else f"{self.ranks}x"
        return " ".join([self.model, self.dtype, place, *words, *["compiled"] * self.compiled])

    @property
    def builtin(self) -> bool:
        return ":" in self.model

    @property
    def alone(self) -> Case:
        """The same model on one rank."""
        return Case(self.model, self.dtype)

    def engine(self, root: Path) -> Engine:
        path = self.model if self.builtin else str(root / self.model)
        degrees: dict[str, Any] = dict(sp_degree=self.sp, ring_degree=self.ring, tp_size=self.tp)
        return Engine(
            settings(
                model_path=path,
                dtype=self.dtype,
                num_gpus=self.ranks,
                enable_disagg=self.apart,
                cfg_parallel_degree=self.cfg,
                enable_torch_compile=self.compiled,
                **degrees,
            )
        )


def both(case: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype in ("float32", "bfloat16")]


FLUX, EMOJI = partial(Case, "flux-6-heads", "float32"), partial(Case, "builtin:emoji", "float32")
CASES = [
    *both(FLUX(ranks=3, apart=True, sp=2)),
    *both(FLUX(ranks=4, apart=True, sp=3)),
    FLUX(ranks=4, sp=2),
    *both(FLUX(ranks=2, sp=2)),
    FLUX(ranks=2, tp=2),
    replace(FLUX(ranks=2, sp=2, ring=2), dtype="bfloat16"),
    EMOJI(ranks=2, cfg=2),
    replace(FLUX(ranks=2, sp=2, compiled=True), dtype="bfloat16"),
    replace(FLUX(ranks=3, apart=True, sp=2, ring=2), dtype="bfloat16"),  # its kernels take no float32 on a GPU
    *both(FLUX(ranks=3, apart=True, tp=2)),
    *both(FLUX(ranks=4, sp=2, tp=2)),
    # The pictures of these two depend on the prompt less than on bfloat16's rounding.
    Case("flux2-klein", "float32", ranks=3, apart=True, tp=2),
    Case("qwen-image", "float32", ranks=3, apart=True, tp=2),
    Case("qwen-image", "float32", ranks=3, apart=True, cfg=2),
    *both(EMOJI(ranks=3, apart=True, cfg=2)),
    FLUX(ranks=2, apart=True, compiled=True),
    replace(FLUX(ranks=3, apart=True, sp=2, compiled=True), dtype="bfloat16"),
]
CANCELLED = CASES[0]


class Drawing:
    """Draws the pictures of cases, several engines at a time, each case once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._started: dict[Case, Future[list[Pixels]]] = {}

    def start(self, cases: list[Case]) -> None:
        """Those that take longest first."""
        for case in sorted(set(cases), key=lambda case: (case.compiled, case.ranks), reverse=True):
            if not case.builtin:
                tiny_models.build(case.model, self._root, VARIANTS.get(case.model))
            self._started[case] = self._pool.submit(self._draw, case)

    def __call__(self, case: Case) -> list[Pixels]:
        return self._started[case].result(2 * SECONDS)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _draw(self, case: Case) -> list[Pixels]:
        with case.engine(self._root) as engine:
            if case == CANCELLED:
                cancel_between_steps(engine)
            drawn = [pixels(result) for result in draw(engine, [params(engine, prompt) for prompt in PROMPTS * 2])]
            ranks = at_rest(engine)
            assert len(ranks) == case.ranks and (not ON_GPUS or all(rank.device_allocated for rank in ranks))
            return drawn


def params(engine: Engine, prompt: str, steps: int = 4) -> SamplingParams:
    """An odd number of image tokens, so that ranks get unequal parts; one seed, so that only the prompt tells apart."""
    side = engine.card.size_multiple
    return SamplingParams(prompt=prompt, seed=3, height=15 * side, width=11 * side, num_inference_steps=steps)


def cancel_between_steps(engine: Engine) -> None:
    """A long request at several steps, while another one waits."""
    for step in (1, 2, 7):
        ticket = engine.submit(params(engine, "a cat", steps=900))
        reaches_step(ticket, step)
        following = engine.submit(params(engine, PROMPTS[0]))
        ticket.cancel()
        with pytest.raises(RequestCancelled):
            ticket.result(SECONDS)
        following.result(SECONDS)


@pytest.fixture(scope="module")
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawing]:
    """Starts what the tests that will run need, and nothing else."""
    needed = [item for item in request.session.items if "drawn" in getattr(item, "fixturenames", ())]
    chosen = [item.callspec.params["case"] for item in needed]
    drawing = Drawing(tmp_path_factory.mktemp("tiny"))
    drawing.start([each for case in chosen for each in (case, case.alone)])
    yield drawing
    drawing.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=needs(case.ranks)) for case in CASES])
def test_ranks_together_draw_the_pictures_of_one(drawn: Drawing, case: Case, record_property: Record) -> None:
    together, alone = drawn(case), drawn(case.alone)
    allowed = LEVELS if case.dtype == "float32" else LEVELS_IN_BFLOAT16
    found, apart = distance(together, alone), distance(alone[:1], alone[1:2])
    record_property("off", f"{found:.3f} of {allowed:.3f} allowed, two prompts are {apart:.1f} apart")
    assert found <= allowed
    assert apart > 2 * allowed, "these pictures are too much alike to tell anything"
