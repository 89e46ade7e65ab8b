"""A run as Chrome's trace, as a page and as a picture, and when an engine writes them."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from sample_run import RUN, one_request, span, timeline, topology

from ditrelay import Engine, ServerArgs
from ditrelay.cli import main
from ditrelay.errors import ConfigError
from ditrelay.runtime.metrics import Span
from ditrelay.runtime.timeline import PALETTE, build_timeline
from ditrelay.runtime.trace import TraceFiles, chrome_trace, display_name, write_trace
from ditrelay.runtime.trace_page import timeline_page
from ditrelay.runtime.trace_picture import LANE, LANES_LEFT, LANES_RIGHT, WIDTH, draw_timeline, tick_step

QUICK = "builtin:timed?encode=0.01&denoise=0.06&decode=0.01&steps=3&conditioning_mb=0.1&latents_mb=0.1"


# ---------------------------------------------------------------- Chrome's trace format


def test_every_rank_is_a_process_and_every_lane_a_thread() -> None:
    events = chrome_trace(timeline())["traceEvents"]
    processes = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    threads = [(each["pid"], each["args"]["name"]) for each in events if each["name"] == "thread_name"]
    assert processes == {0: "rank 0 (DiT)", 1: "rank 1 (DiT)", 2: "rank 2 (DiT)", 3: "rank 3 (non-DiT)"}
    assert sorted(kind for rank, kind in threads if rank == 3) == ["decode", "encode", "receive", "send"]
    assert len({each["tid"] for each in events if each["name"] == "thread_name"}) == len(threads) == 13


def test_slices_of_a_thread_follow_or_hold_each_other() -> None:
    threads: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for each in chrome_trace(timeline())["traceEvents"]:
        if each["ph"] == "X":
            threads[each["tid"]].append((each["ts"], each["ts"] + each["dur"]))
    for slices in threads.values():
        open_until: list[float] = []
        for began, ended in sorted(slices, key=lambda pair: (pair[0], -pair[1])):
            while open_until and open_until[-1] <= began + 1e-6:
                open_until.pop()
            assert not open_until or ended <= open_until[-1] + 1e-6
            open_until.append(ended)


def test_a_denoise_holds_a_slice_for_each_of_its_steps() -> None:
    events = chrome_trace(timeline())["traceEvents"]
    (bar,) = [each for each in events if each["name"] == "denoise 1"]
    steps = [each for each in events if each.get("cat") == "step" and each["tid"] == bar["tid"]][:3]
    assert [each["name"] for each in steps] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert steps[0]["ts"] == bar["ts"] == pytest.approx(250_000)
    assert [each["dur"] for each in steps] == pytest.approx([150_000, 200_000, 150_000])
    assert bar["args"] == {"request": 1, "request_id": "a"}


def test_arrows_lead_from_a_stage_of_a_request_to_its_next() -> None:
    events = chrome_trace(timeline())["traceEvents"]
    arrows: dict[str, list[tuple[str, int]]] = defaultdict(list)
    slices = [each for each in events if each["ph"] == "X" and each["cat"] != "step"]
    for each in (each for each in events if each.get("cat") == "request"):
        (held,) = [s for s in slices if s["tid"] == each["tid"] and s["ts"] <= each["ts"] < s["ts"] + s["dur"]]
        arrows[each["id"]].append((each["ph"], held["name"]))
    assert arrows["1.0"] == [("s", "encode 1"), ("f", "denoise 1")]
    assert arrows["1.1"] == [("s", "denoise 1"), ("f", "decode 1")]
    assert len(arrows) == 6


# ---------------------------------------------------------------- the page


def test_the_page_holds_all_bars_and_needs_nothing_from_elsewhere() -> None:
    page = timeline_page(timeline())
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    data = json.loads(held[1])
    bars = [bar for group in data["groups"] for lane in group["lanes"] for track in lane["tracks"] for bar in track]
    assert len(bars) == len(list(timeline().bars))
    assert [1, 0.25, 0.75, [0.4, 0.6, 0.75]] in bars
    assert data["ids"] == {"1": "a", "2": "b", "3": "c"}
    assert not re.search(r"https?:|src=|@import|url\(|<link", page)


def test_a_name_cannot_end_the_script_that_it_is_in() -> None:
    page = timeline_page(build_timeline(RUN, topology(), model="</script><script>alert(1)"))
    assert "<script>alert" not in page and page.count("</script>") == 2


# ---------------------------------------------------------------- the picture


def colours(picture: Image.Image, y: int) -> list[str]:
    """The colours along a row of the lanes, each once per run of it."""
    found: list[str] = []
    for x in range(LANES_LEFT, LANES_RIGHT):
        red, green, blue = picture.getpixel((x, y))  # type: ignore[misc]
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        if (colour in PALETTE or colour == LANE) and found[-1:] != [colour]:
            found.append(colour)
    return found


def test_the_picture_shows_bars_in_their_requests_colours_and_the_gaps_between_them() -> None:
    picture = draw_timeline(timeline())
    rows = [colours(picture, y) for y in range(picture.height)]
    assert picture.width == WIDTH
    assert [LANE, PALETTE[0], LANE, PALETTE[2], LANE] in rows  # rank 0 denoises 1, then 3
    assert [LANE, PALETTE[1], LANE] in rows


def test_where_a_bar_is_in_the_picture_is_when_it_was() -> None:
    picture, of_bar = draw_timeline(timeline()), ImageColor.getrgb(PALETTE[1])
    rows = ([x for x in range(LANES_LEFT, LANES_RIGHT) if picture.getpixel((x, y)) == of_bar] for y in range(200, 500))
    xs = max(rows, key=len)  # the denoise of request 2
    share = [(x - LANES_LEFT) / (LANES_RIGHT - LANES_LEFT) for x in (xs[0], xs[-1])]
    assert share == pytest.approx([0.45 / 1.5, 0.95 / 1.5], abs=0.006)


def test_a_bar_of_no_length_is_seen() -> None:
    made = timeline([span("a", 0, "denoise", 0, 10), span("b", 1, "denoise", 5, 5.00001)])
    picture = draw_timeline(made)
    assert any(PALETTE[1] in colours(picture, y) for y in range(picture.height))


@pytest.mark.parametrize(
    "spans, model",
    [([], "flux"), ([span("a", 0, "denoise", 5, 5)], "flux"), (RUN, "a-long-name" * 40)],
    ids=["nothing done", "no time passed", "a long name"],
)
def test_any_run_can_be_drawn(spans: list[Span], model: str) -> None:
    assert draw_timeline(build_timeline(spans, topology(), model=model)).width == WIDTH


@pytest.mark.parametrize(
    "seconds, step", [(12.0, 1.0), (12.1, 2.0), (0.5, 0.05), (1e-3, 1e-4), (3600.0, 500.0), (0.0, 1e-7)]
)
def test_the_time_axis_has_at_most_a_dozen_round_marks(seconds: float, step: float) -> None:
    assert tick_step(seconds) == pytest.approx(step)


# ---------------------------------------------------------------- files


def test_three_files_of_one_name_are_written_also_into_a_new_folder(tmp_path: Path) -> None:
    made = write_trace(tmp_path / "new" / "run.json", RUN, topology(), model="flux")
    assert made == TraceFiles.at(tmp_path / "new" / "run.json")
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == ["run.html", "run.json", "run.png"]
    assert json.loads(made.perfetto.read_text())["otherData"]["model"] == "flux"
    assert Image.open(made.picture).width == WIDTH
    assert str(made).endswith("run.json, run.html, run.png")


def test_the_picture_of_a_long_run_shows_its_newest_requests_and_the_trace_all(tmp_path: Path) -> None:
    spans = [each for i in range(70) for each in one_request(str(i), i % 3, 100.0 + i)]
    made = write_trace(tmp_path / "run.json", spans, topology(), model="flux")
    newest = draw_timeline(build_timeline(spans, topology(), model="flux", newest=64))
    assert Image.open(made.picture).convert("RGB").tobytes() == newest.tobytes()
    assert "decode 1" in {each["name"] for each in json.loads(made.perfetto.read_text())["traceEvents"]}


@pytest.mark.parametrize("make", [lambda path: ServerArgs(trace=path), TraceFiles.at], ids=["settings", "write_trace"])
@pytest.mark.parametrize("path", ["run.png", "run", "", ".json"])
def test_only_a_json_file_name_is_allowed(make: Callable[[str], object], path: str) -> None:
    with pytest.raises(ConfigError, match=r"^(--)?trace: .*allowed: a file name that ends in \.json$"):
        make(path)


def test_a_folder_that_cannot_be_made_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="trace: cannot make the folder"):
        Engine(ServerArgs(model_path=QUICK, device="cpu", trace=str(tmp_path / "file" / "run.json")))


@pytest.mark.parametrize(
    "path, name",
    [
        ("/models/FLUX.1-dev/", "FLUX.1-dev"),
        ("org/FLUX.1-dev", "FLUX.1-dev"),
        (QUICK, "builtin:timed"),
        ("builtin:emoji", "builtin:emoji"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path(path: str, name: str) -> None:
    assert display_name(path) == name


# ---------------------------------------------------------------- a run


def settings(**changes: object) -> ServerArgs:
    return ServerArgs(**{"model_path": QUICK, "device": "cpu", "enable_disagg": True, "num_gpus": 2, **changes})


def test_an_engine_writes_the_trace_of_its_requests_at_its_end_without_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Engine(settings(trace="traces/run.json")) as engine:
        ids = {engine.generate(f"picture {i}", seed=i).request_id for i in range(3)}
        assert engine.trace_files is None
    assert engine.trace_files == TraceFiles.at("traces/run.json")
    slices = [s for s in json.loads(Path("traces/run.json").read_text())["traceEvents"] if s["ph"] == "X"]
    assert {each["args"]["request_id"] for each in slices if each["cat"] != "step"} == ids
    counts = {kind: sum(each["cat"] == kind for each in slices) for kind in ("encode", "denoise", "decode", "step")}
    assert counts == {"encode": 3, "denoise": 3, "decode": 3, "step": 9}
    assert {(each["pid"], each["cat"]) for each in slices} >= {(0, "send"), (0, "receive"), (1, "send"), (1, "receive")}


def test_an_engine_that_drew_nothing_writes_nothing(tmp_path: Path) -> None:
    engine = Engine(settings(trace=str(tmp_path / "run.json")))
    engine.close()
    assert engine.trace_files is None and list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_told_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.json"
    with caplog.at_level(logging.ERROR, "ditrelay.engine"), Engine(settings(trace=str(path), warmup=False)) as engine:
        result = engine.generate("a cat", seed=1)
        path.mkdir()  # in the way
    assert result.media and engine.trace_files is None
    assert "the timeline could not be written" in caplog.text


def test_generate_says_where_the_timeline_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model-path", QUICK, "--device", "cpu", "--enable-disagg", "--num-gpus", "2", "--trace", "run.json"]
    assert main(["generate", "a cat", "--output", "cat.png", *flags]) == 0
    assert "timeline: run.json, run.html, run.png" in capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cat.png", "run.html", "run.json", "run.png"]
