from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from ditrelay.cli import main
from ditrelay.errors import ConfigError
from ditrelay.models.quirks import ATTENTION_BACKENDS
from ditrelay.runtime.flags import format_bytes, parse_bytes
from ditrelay.runtime.server_args import ServerArgs, server_flags

FLAGS = {flag.name: flag for flag in server_flags()}


def refused(**values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        ServerArgs(**values)
    return caught.value


def test_defaults_are_one_colocated_rank_with_the_built_in_model() -> None:
    args = ServerArgs()
    assert (args.model_path, args.num_gpus, args.num_dit_ranks, args.enable_disagg) == ("builtin:emoji", 1, 1, False)
    assert (args.max_pending_transfers, args.max_pending_bytes, args.use_async_comm) == (2, 1 << 30, True)
    assert args.encoder_decoder_split is None


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerArgs().num_gpus = 2  # type: ignore[misc]


def test_model_name_is_the_served_name_or_the_path() -> None:
    assert ServerArgs(model_path="/models/flux").model_name == "/models/flux"
    assert ServerArgs(model_path="/models/flux", served_model_name="flux").model_name == "flux"


def test_every_field_is_a_flag_with_help_and_a_group() -> None:
    flags = [flag.name for flag in server_flags()]
    assert sorted(flags) == sorted(field.name for field in dataclasses.fields(ServerArgs))
    groups = [group for group, _ in itertools.groupby(server_flags(), key=lambda flag: flag.spec.group)]
    assert len(groups) == len(set(groups))
    assert all(flag.spec.help.endswith(".") and flag.spec.group for flag in server_flags())
    assert FLAGS["num_non_dit_ranks"].option == "--num-non-dit-ranks"


@pytest.mark.parametrize(
    "values",
    [
        {"num_gpus": 0},
        {"num_gpus": -1},
        {"num_gpus": True},
        {"num_gpus": 2.0},
        {"num_gpus": "2"},
        {"num_gpus": None},
        {"enable_disagg": 1},
        {"enable_disagg": "true"},
        {"sp_degree": 0},
        {"tp_size": 0},
        {"max_pending_transfers": 0},
        {"max_pending_bytes": 0},
        {"port": -1},
        {"port": 65536},
        {"dist_timeout": 0},
        {"dist_timeout": -1.0},
        {"dist_timeout": math.nan},
        {"dist_timeout": math.inf},
        {"dist_timeout": True},
        {"stage_timeout": 1e30},
        {"max_queue": 0},
        {"max_attempts": 0},
        {"dtype": "fp32"},
        {"dtype": ""},
        {"device": "tpu"},
        {"attention_backend": "magic"},
        {"log_level": "INFO"},
        {"model_path": ""},
        {"model_path": "  "},
        {"served_model_name": ""},
        {"host": ""},
        {"num_encoder_ranks": 0},
        {"num_decoder_ranks": -2},
    ],
    ids=str,
)
def test_wrong_value_is_refused_by_the_name_of_its_flag(values: dict[str, Any]) -> None:
    (name,) = values
    error = refused(**values)
    assert error.flag == FLAGS[name].option
    assert error.on_command_line.startswith(f"{error.flag}: ") and "allowed: " in error.on_command_line


def test_attention_backends_are_those_that_the_models_know() -> None:
    assert set(FLAGS["attention_backend"].spec.choices) == set(ATTENTION_BACKENDS)


def test_integer_is_taken_where_a_number_of_seconds_is_asked_for() -> None:
    seconds = ServerArgs(dist_timeout=5).dist_timeout
    assert seconds == 5.0 and type(seconds) is float


@pytest.mark.parametrize("num_gpus, non_dit", [(2, 2), (4, 4), (4, 9)])
def test_disaggregation_must_leave_a_dit_rank(num_gpus: int, non_dit: int) -> None:
    error = refused(enable_disagg=True, num_gpus=num_gpus, num_non_dit_ranks=non_dit)
    assert error.flag == "--num-non-dit-ranks" and f"1 to {num_gpus - 1}" in error.on_command_line


def test_disaggregation_needs_two_ranks() -> None:
    assert refused(enable_disagg=True).flag == "--num-gpus"


def test_parallel_degrees_must_fit_the_dit_ranks() -> None:
    assert refused(num_gpus=4, enable_disagg=True, sp_degree=4).flag == "--sp-degree"
    assert refused(num_gpus=4, enable_disagg=True, tp_size=4).flag == "--tp-size"
    assert refused(num_gpus=4, sp_degree=4, tp_size=2).flag == "--sp-degree"
    assert ServerArgs(num_gpus=4, sp_degree=2, tp_size=2).num_dit_ranks == 4
    assert ServerArgs(num_gpus=4, enable_disagg=True, sp_degree=3).num_dit_ranks == 3


@pytest.mark.parametrize(
    "given, degrees",
    [
        ({}, (1, 1)),
        ({"sp_degree": 4}, (4, 1)),
        ({"ulysses_degree": 2}, (2, 1)),
        ({"ring_degree": 2}, (1, 2)),
        ({"ulysses_degree": 2, "ring_degree": 2}, (2, 2)),
        ({"sp_degree": 4, "ring_degree": 2}, (2, 2)),
        ({"sp_degree": 4, "ulysses_degree": 4}, (4, 1)),
        ({"sp_degree": 4, "ulysses_degree": 1}, (1, 4)),
    ],
)
def test_sequence_degrees_that_are_not_given_follow_from_the_others(
    given: dict[str, int], degrees: tuple[int, int]
) -> None:
    args = ServerArgs(num_gpus=4, **given)
    assert args.sequence_split == degrees and args.sp_degree == math.prod(degrees)
    assert dataclasses.replace(args) == args


@pytest.mark.parametrize(
    "given, flag, allowed",
    [
        ({"sp_degree": 4, "ulysses_degree": 2, "ring_degree": 1}, "--sp-degree", "allowed: 2"),
        ({"sp_degree": 4, "ulysses_degree": 3}, "--ulysses-degree", "allowed: 1, 2, 4"),
        ({"sp_degree": 2, "ring_degree": 4}, "--ring-degree", "allowed: 1, 2"),
        ({"ulysses_degree": 4, "ring_degree": 4}, "--sp-degree", "at most 8"),
        ({"sp_degree": 4, "cfg_parallel_degree": 2, "tp_size": 2}, "--sp-degree", "at most 8"),
        ({"cfg_parallel_degree": 3}, "--cfg-parallel-degree", "from 1 to 2"),
    ],
)
def test_contradicting_degrees_are_refused_by_name(given: dict[str, int], flag: str, allowed: str) -> None:
    error = refused(num_gpus=8, **given)
    assert error.flag == flag and allowed in error.on_command_line


@pytest.mark.parametrize(
    "given, split",
    [
        ({}, None),
        ({"num_encoder_ranks": 1}, (1, 2)),
        ({"num_decoder_ranks": 1}, (2, 1)),
        ({"num_encoder_ranks": 2, "num_decoder_ranks": 1}, (2, 1)),
    ],
)
def test_encoder_and_decoder_ranks_fill_the_non_dit_ranks(given: dict[str, int], split: tuple[int, int] | None) -> None:
    assert ServerArgs(enable_disagg=True, num_gpus=5, num_non_dit_ranks=3, **given).encoder_decoder_split == split


def test_encoder_and_decoder_ranks_must_add_up() -> None:
    error = refused(enable_disagg=True, num_gpus=5, num_non_dit_ranks=3, num_encoder_ranks=2, num_decoder_ranks=2)
    assert error.flag == "--num-non-dit-ranks" and "allowed: 4" in error.on_command_line


@pytest.mark.parametrize("name", ["num_encoder_ranks", "num_decoder_ranks"])
@pytest.mark.parametrize("total", [1, 2])
def test_encoder_ranks_must_leave_a_decoder_rank_and_the_other_way_round(name: str, total: int) -> None:
    error = refused(enable_disagg=True, num_gpus=4, num_non_dit_ranks=total, **{name: total})
    assert error.flag == FLAGS[name].option


def test_turning_disaggregation_off_keeps_the_other_settings_valid() -> None:
    args = ServerArgs(enable_disagg=True, num_gpus=4, num_non_dit_ranks=2, num_encoder_ranks=1)
    colocated = dataclasses.replace(args, enable_disagg=False)
    assert (colocated.num_dit_ranks, colocated.encoder_decoder_split) == (4, None)


@pytest.mark.parametrize(
    "text, size",
    [
        ("1", 1),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1gib", 1 << 30),
        ("1.5 KiB", 1536),
        ("2MB", 2_000_000),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_bytes_are_read_with_and_without_a_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("count, text", [(1 << 30, "1GiB"), (1536, "1536B"), (3 << 20, "3MiB"), (0, "0B")])
def test_bytes_are_written_so_that_they_can_be_read_back(count: int, text: str) -> None:
    assert format_bytes(count) == text
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1XB", "1e3", "1 2", "0x10", "nan"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("num_gpus", " 4 ", 4),
        ("dist_timeout", "2.5", 2.5),
        ("max_pending_bytes", "64MiB", 64 << 20),
        ("warmup", "False", False),
        ("warmup", "yes", True),
        ("dtype", "bfloat16", "bfloat16"),
        ("num_encoder_ranks", "2", 2),
    ],
)
def test_flag_reads_its_value_from_text(name: str, text: str, value: object) -> None:
    assert FLAGS[name].parse(text) == value


@pytest.mark.parametrize(
    "name, text",
    [
        ("num_gpus", "four"),
        ("num_gpus", "1.5"),
        ("num_gpus", "0"),
        ("num_gpus", ""),
        ("dist_timeout", "nan"),
        ("dist_timeout", "1e999"),
        ("warmup", "maybe"),
        ("max_pending_bytes", "0MiB"),
        ("max_pending_bytes", "lots"),
        ("dtype", "float"),
    ],
)
def test_flag_refuses_text_that_is_not_allowed(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{FLAGS[name].option}: .*allowed: "):
        FLAGS[name].parse(text)


def test_every_flag_is_described_in_the_users_guide() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "usage.md").read_text()
    spellings = {flag.option: (f"`{flag.option}", f"`--no-{flag.option[2:]}") for flag in FLAGS.values()}
    assert [option for option, known in spellings.items() if not any(each in guide for each in known)] == []


def test_a_flag_with_several_values_may_come_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[ServerArgs] = []
    monkeypatch.setattr("ditrelay.server.app.serve", lambda args: got.append(args) or 0)
    origins = "http://a.example,http://b.example"
    assert main(["serve", "--host", "127.0.0.1", "--host=::1", "--cors-origin", origins]) == 0
    assert got[0].hosts == ("127.0.0.1", "::1")
    assert got[0].cors_origins == ("http://a.example", "http://b.example")
    assert main(["serve"]) == 0
    assert (got[1].host, got[1].cors_origin) == ("127.0.0.1", None)
