"""What is said of a placement: medians, bounds by the formulas of the performance page, and plain words."""

from __future__ import annotations

import pytest

from ditrelay import Engine
from ditrelay.runtime.messages import Heartbeat
from ditrelay.runtime.metrics import Span
from ditrelay.runtime.placement import Advice, StageSeconds, advise, measured
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import Topology

GIB = 1 << 30
# p = 1 s, d = 2 s
SECONDS = StageSeconds(encode=0.25, denoise=2.0, decode=0.75, requests=12)


def built(**changes: object) -> Topology:
    return Topology.build(ServerArgs(**{"enable_disagg": True, "num_gpus": 4, **changes}))


def of(
    topology: Topology, *, lock_step: bool = False, ranks: tuple[Heartbeat, ...] = (), cores: int | None = None
) -> Advice:
    return advise(topology, SECONDS, lock_step=lock_step, ranks=ranks, cores=cores)


def rates(advice: Advice) -> dict[str, float]:
    return {option.name: pytest.approx(option.rate) for option in advice.options}


def stages(request_id: str, encode: float, denoise: float, decode: float) -> list[Span]:
    return [
        Span(request_id, 1, "encode", 5.0, 5.0 + encode),
        Span(request_id, 0, "receive", 5.0, 9.0),
        Span(request_id, 0, "denoise", 6.0, 6.0 + denoise),
        Span(request_id, 1, "decode", 9.0, 9.0 + decode),
    ]


def test_medians_are_of_the_requests_that_went_all_the_way() -> None:
    spans = stages("a", 1, 10, 3) + stages("b", 2, 20, 4) + stages("c", 9, 90, 5) + stages("d", 100, 100, 100)[:2]
    assert measured(spans) == StageSeconds(encode=2, denoise=20, decode=4, requests=3)


def test_nothing_is_said_by_fewer_than_three_requests() -> None:
    assert measured(stages("a", 1, 10, 3) + stages("b", 2, 20, 4)) is None


def test_fixed_roles_are_compared_with_all_roles_everywhere_and_with_the_best_split() -> None:
    advice = of(built())
    # min(1 / p, 3 / d), 4 / (p + d); 2+2 makes min(2 / p, 2 / d), which is no more
    assert rates(advice) == {"3 DiT + 1 non-DiT": 1.0, "4 with all roles": 4 / 3}
    assert "4 with all roles 1.33 (33% more)" in advice.text
    assert advice.text.endswith("Disaggregate for memory, not for requests a second.")


def test_a_better_split_is_named() -> None:
    advice = of(built(num_gpus=6))
    assert rates(advice) == {"5 DiT + 1 non-DiT": 1.0, "6 with all roles": 2.0, "4 DiT + 2 non-DiT": 2.0}


def test_encoders_and_decoders_apart_have_rates_of_their_own() -> None:
    advice = of(built(num_non_dit_ranks=2, num_encoder_ranks=1, num_decoder_ranks=1))
    assert rates(advice)["2 DiT + 1 encode + 1 decode"] == 1.0  # min(1 / e, 2 / d, 1 / v)


def test_where_all_roles_leave_ranks_idle_disaggregation_wins() -> None:
    advice = of(built(sp_degree=3))
    assert rates(advice) == {"3 DiT + 1 non-DiT": 0.5, "1 x 3 with all roles": 1 / 3}
    assert advice.text.endswith("; 1 x 3 with all roles 0.333 (33% fewer). Disaggregate.")


def test_lock_step_is_told_what_it_gives_away() -> None:
    advice = of(built(num_gpus=2), lock_step=True)
    assert rates(advice) == {
        "1 DiT + 1 non-DiT in lock-step": 1 / 3,
        "2 with all roles": 2 / 3,
        "1 DiT + 1 non-DiT": 0.5,
    }


def test_all_roles_everywhere_are_compared_with_the_best_split() -> None:
    advice = of(built(enable_disagg=False, num_gpus=3))
    assert rates(advice) == {"3 with all roles": 1.0, "2 DiT + 1 non-DiT": 1.0}
    assert "2 DiT + 1 non-DiT 1 (no more and no fewer)" in advice.text
    alone = of(built(enable_disagg=False, num_gpus=1))
    assert rates(alone) == {"1 with all roles": 1 / 3} and alone.text.endswith("0.333 requests/s at most.")


def test_replicas_of_different_sizes_are_not_compared() -> None:
    advice = of(built(sp_degree=2))
    assert list(rates(advice)) == ["3 DiT + 1 non-DiT"]


@pytest.mark.parametrize(("total", "fits"), [(40, True), (30, False)])
def test_what_does_not_fit_one_gpu_is_said_to_need_disaggregation(total: int, fits: bool) -> None:
    ranks = tuple(
        Heartbeat(rank, 0.0, device_total=total * GIB, device_peak=peak * GIB)
        for rank, peak in enumerate((22, 21, 22, 12))
    )
    text = of(built(), ranks=ranks).text
    assert ("All roles need about 34.0 GiB and a rank has 30.0: disaggregate." in text) is not fits
    assert ("not for requests a second" in text) is fits


def test_encoders_and_decoders_apart_count_both_beside_the_dit() -> None:
    topology = built(num_non_dit_ranks=2, num_encoder_ranks=1, num_decoder_ranks=1)
    ranks = tuple(
        Heartbeat(rank, 0.0, device_total=30 * GIB, device_peak=peak * GIB) for rank, peak in enumerate((15, 14, 11, 6))
    )
    assert "All roles need about 32.0 GiB and a rank has 30.0: disaggregate." in of(topology, ranks=ranks).text
    assert "GiB" not in of(topology, ranks=ranks[:3]).text, "the decoder's memory is not known"


@pytest.mark.parametrize(("cores", "said"), [(2, False), (4, True), (None, True)])
def test_ranks_that_share_cores_show_nothing(cores: int | None, said: bool) -> None:
    advice = of(built(), cores=cores)
    assert bool(advice.options) is said
    assert ("4 ranks share 2 cores, so which placement is best can't be told here" in advice.text) is not said


def test_the_engine_goes_by_its_requests_and_not_by_its_warm_up() -> None:
    model = "builtin:timed?encode=0.01&denoise=0.1&decode=0.02&steps=2"
    with Engine(ServerArgs(model_path=model, device="cpu", num_gpus=2, enable_disagg=True)) as engine:
        assert engine.advice() is None
        engine.generate(["a", "b", "c"])
        advice = engine.advice()
        assert advice is not None and advice.seconds.requests == 3
        assert 0.1 <= advice.seconds.denoise < 0.2 and 0.01 <= advice.seconds.encode < 0.1
