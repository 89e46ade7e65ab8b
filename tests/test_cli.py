from __future__ import annotations

import dataclasses
import io
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from ditrelay import __version__, doctor
from ditrelay.cli import app, main
from ditrelay.cli_files import slug
from ditrelay.cli_flags import normalise
from ditrelay.cli_generate import Order, generate
from ditrelay.cli_progress import LiveDisplay, PlainDisplay
from ditrelay.cli_report import report_table
from ditrelay.cli_run import Job, Outcome, Run
from ditrelay.engine import EngineStatus, Progress, Result, Ticket
from ditrelay.errors import QueueFull, RequestCancelled, RequestFailed, StartupError
from ditrelay.models.card import load_card
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.placement import Advice, StageSeconds, advise
from ditrelay.runtime.request import Request, RequestState, SamplingParams
from ditrelay.runtime.server_args import ServerArgs, server_flags
from ditrelay.runtime.topology import Topology

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class FakeEngine:
    """Ends each request in ``submit``; ``[fail]`` in a prompt fails it, ``[hang]`` never ends it."""

    def __init__(self, args: ServerArgs) -> None:
        self.args = args
        self.card = load_card("builtin:emoji")
        self.topology = Topology.build(args)
        self.submitted: list[SamplingParams] = []
        self.cancelled: list[str] = []
        self.started = self.closed = False
        self.room = args.max_queue

    def start(self) -> None:
        self.started = True

    def close(self, timeout: float, *, at_once: bool = False) -> None:
        assert timeout <= 10
        self.closed = True

    def overlap(self) -> float:
        return 0.42

    def advice(self) -> Advice | None:
        seconds = StageSeconds(encode=0.1, denoise=2.0, decode=0.4, requests=len(self.submitted))
        return advise(self.topology, seconds, lock_step=False, ranks=(), cores=None)

    def status(self) -> EngineStatus:
        return EngineStatus(ready=True, workers=())

    def submit(self, params: SamplingParams) -> Ticket:
        self.submitted.append(params)
        request = Request(request_id=f"r{len(self.submitted)}", params=params)
        ticket = Ticket(request, self.cancelled.append)
        ticket.report(Progress(request.request_id, RequestState.QUEUED))
        for step in range(3):
            ticket.report(Progress(request.request_id, RequestState.DENOISING, step, 2))
        self.finish(ticket, params)
        return ticket

    def finish(self, ticket: Ticket, params: SamplingParams) -> None:
        if "[fail]" in params.prompt:
            ticket.fail(RequestFailed(ticket.request_id, "the stage broke"), RequestState.FAILED, 0.0)
        elif "[hang]" not in params.prompt:
            ticket.succeed(result_of(ticket.request_id, params), 0.0)


def result_of(request_id: str, params: SamplingParams) -> Result:
    timings = Timings(encode=0.25, denoise=1.5, decode=0.125, to_dit=0.004, total=1.9)
    media = png(params.seed or 0)
    return Result(request_id, params, media, "image/png", 8, 8, 1, timings)


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str
    engine: FakeEngine | None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line in an empty directory, with a fake engine."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, engine_class: type[FakeEngine] = FakeEngine) -> Ran:
        made: list[FakeEngine] = []

        def make_engine(args: ServerArgs) -> Any:
            made.append(engine_class(args))
            return made[0]

        code = main(list(words), make_engine=make_engine)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err, made[0] if made else None)

    return run


def ditrelay(*words: str, module: str = "ditrelay", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, env=ENVIRONMENT, cwd=cwd, capture_output=True, text=True, timeout=60)


# ---------------------------------------------------------------- flags


SWITCHES, VALUED = {"--warmup", "--enable-disagg"}, {"--num-gpus", "--output"}


@pytest.mark.parametrize(
    "given, normal",
    [
        (["--warmup"], ["--warmup=true"]),
        (["--no-warmup"], ["--warmup=false"]),
        (["--warmup", "false", "a cat"], ["--warmup=false", "a cat"]),
        (["--warmup", "True", "a cat"], ["--warmup=True", "a cat"]),
        (["--warmup=false"], ["--warmup=false"]),
        (["--enable-disagg", "a cat"], ["--enable-disagg=true", "a cat"]),
        (["--enable_disagg", "--num_gpus=4"], ["--enable-disagg=true", "--num-gpus=4"]),
        (["--no_warmup"], ["--warmup=false"]),
        (["--num_gpus", "4", "a_b"], ["--num-gpus", "4", "a_b"]),
        (["--output", "--warmup", "true"], ["--output", "--warmup", "true"]),
        (["--", "--warmup", "false"], ["--", "--warmup", "false"]),
        (["--un_known", "a --warmup"], ["--un_known", "a --warmup"]),
        (["--output"], ["--output"]),
    ],
    ids=" ".join,
)
def test_booleans_are_read_in_every_spelling_and_prompts_are_kept(given: list[str], normal: list[str]) -> None:
    assert normalise(given, switches=SWITCHES, valued=VALUED) == normal


def test_every_server_flag_reaches_the_settings(run: Callable[..., Ran]) -> None:
    ran = run(
        "generate", "--use-async-comm", "false", "a cat", "--enable-disagg", "--num-gpus", "4", "--sp_degree=2",
        "--max-pending-bytes", "64MiB", "--dist-timeout", "2.5", "--no-warmup", "--served-model-name", "toy",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.engine is not None and ran.engine.args == ServerArgs(
        use_async_comm=False,
        enable_disagg=True,
        num_gpus=4,
        sp_degree=2,
        max_pending_bytes=64 << 20,
        dist_timeout=2.5,
        warmup=False,
        served_model_name="toy",
        log_level="warning",
    )
    assert [params.prompt for params in ran.engine.submitted] == ["a cat"]


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_help_names_every_field_of_the_settings(
    command: str, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ran = run(command, "--help")
    assert ran.code == 0
    for field in dataclasses.fields(ServerArgs):
        assert f"--{field.name.replace('_', '-')} " in ran.out


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate"], "PROMPT: there is none"),
        (["generate", "a cat", "--num-gpus", "four"], "--num-gpus: 'four' is not allowed; allowed: an integer"),
        (["generate", "a cat", "--num-gpus", "0"], "--num-gpus: 0 is not allowed; allowed: an integer of at least 1"),
        (["generate", "a cat", "--dtype", "fp8"], "--dtype: 'fp8' is not allowed; allowed: auto, float32"),
        (["generate", "a cat", "--warmup=perhaps"], "--warmup: 'perhaps' is not allowed; allowed: true or false"),
        (["generate", "a cat", "--no-warmup=true"], "--no-warmup: takes no value"),
        (["generate", "a cat", "--sp-degree", "2"], "--sp-degree: sp-degree 2 x tp-size 1 needs 2 DiT ranks"),
        (["generate", "a cat", "--enable-disagg", "--num-gpus", "2", "--num-non-dit-ranks", "2"], "allowed: 1 to 1"),
        (["generate", "a cat", "--seed", "abc"], "--seed: 'abc' is not allowed"),
        (["generate", "a cat", "--seed", "-1"], "--seed: -1 is not allowed; allowed: an integer of at least 0"),
        (["generate", "a cat", "--seed", str(2**63)], "--seed: "),
        (["generate", "a cat", "--guidance-scale", "nan"], "--guidance-scale: nan is not allowed"),
        (["generate", "a cat", "--num-inference-steps", "0"], "--num-inference-steps: 0 is not allowed"),
        (["generate", "a cat", "--num-images", "0"], "--num-images: 0 is not allowed"),
        (["generate", "a cat", "--height", "7"], "--height: "),
        (["generate", "a cat", "--num-frames", "5"], "--num-frames: "),
        (["generate", "a cat", "--seed"], "--seed"),
        (["generate", "a cat", "--bogus"], "--bogus"),
        (["generate", " "], "PROMPT: "),
        (["generate", "a cat", "x" * 100_000], "PROMPT: number 2: "),
        (["generate", "a cat", "--prompt-file", "missing.txt"], "--prompt-file: cannot read missing.txt"),
        (["generate", "a cat", "--prompt-file", "blank.txt"], "--prompt-file: blank.txt has no prompt"),
        (["generate", "a cat", "--prompt-file", "binary"], "--prompt-file: cannot read binary: it is not UTF-8"),
        (["generate", "a cat", "--image", "missing.png"], "--image: cannot read missing.png"),
        (["generate", "a cat", "--output", "cat.bmp"], "--output: cat.bmp: the model makes no such files;"),
        (["generate", "a cat", "--output", "blank.txt"], "--output: cannot make the directory blank.txt"),
        (["generate", "a cat", "--output", "folder.png"], "--output: folder.png is a directory"),
        (["serve", "--port", "65536"], "--port: 65536 is not allowed; allowed: an integer from 0 to 65535"),
        (["serve", "a cat"], "a cat"),
        (["paint"], "paint"),
        (["doctor", "--num-processes", "1"], "--num-processes"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, run: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "folder.png").mkdir()
    ran = run(*words)
    assert ran.code == 2
    assert ran.err.startswith("error: ") and message in ran.err and ran.err.count("\n") == 1
    assert ran.out == "" and (ran.engine is None or not ran.engine.started)


def test_model_folder_that_is_not_there_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = ditrelay("generate", "a cat", "--model-path", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model-path: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- generate


def test_one_picture_is_named_after_its_prompt_and_overwrites_nothing(run: Callable[..., Ran], tmp_path: Path) -> None:
    first, second = run("generate", "A red apple!"), run("generate", "A red apple!")
    assert (first.code, second.code) == (0, 0)
    assert sorted(os.listdir(tmp_path)) == ["a-red-apple-2.png", "a-red-apple.png"]
    assert "wrote a-red-apple.png" in first.out
    assert first.engine is not None and first.engine.closed


def test_one_picture_goes_to_the_file_or_directory_of_output(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert run("generate", "a cat", "--output", "deep/er/cat.PNG").code == 0
    assert run("generate", "a cat", "--output", "cats").code == 0
    assert (tmp_path / "deep/er/cat.PNG").is_file() and (tmp_path / "cats/a-cat.png").is_file()


def test_several_pictures_go_to_a_directory_with_consecutive_seeds(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("﻿a dog\n\n  a fox \r\n")
    ran = run("generate", "a cat", "--prompt-file", "more.txt", "--num-images", "2", "--seed", "7")
    assert ran.code == 0 and ran.engine is not None
    assert [(each.prompt, each.seed) for each in ran.engine.submitted] == [
        ("a cat", 7), ("a cat", 8), ("a dog", 9), ("a dog", 10), ("a fox", 11), ("a fox", 12)
    ]  # fmt: skip
    names = ["1-a-cat.png", "2-a-cat.png", "3-a-dog.png", "4-a-dog.png", "5-a-fox.png", "6-a-fox.png"]
    assert sorted(os.listdir(tmp_path / "ditrelay-output")) == names
    assert (tmp_path / "ditrelay-output/3-a-dog.png").read_bytes() == png(9)
    assert "wrote 6 files to ditrelay-output/" in ran.out


def test_several_pictures_and_the_name_of_one_file_is_refused(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run("generate", "a cat", "a dog", "--output", "pets.png")
    assert ran.code == 2
    assert ran.err == "error: --output: pets.png is one file, and 2 are asked for; allowed: a directory\n"
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.png").mkdir()  # a folder that is there is one, whatever its name
    assert run("generate", "a cat", "a dog", "--output", "old.png").code == 0


@pytest.mark.parametrize(("name", "wanted"), [("cat.jpg", "jpeg"), ("cat.JPEG", "jpeg"), ("cat.webp", "webp")])
def test_the_suffix_of_output_chooses_the_format(run: Callable[..., Ran], name: str, wanted: str) -> None:
    ran = run("generate", "a cat", "--output", name)
    assert ran.code == 0 and ran.engine is not None
    assert [params.output_format for params in ran.engine.submitted] == [wanted]


def test_comments_of_a_prompt_file_are_not_drawn(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# animals\na cat\n\n#1 dad\n  # more\n#\na dog\n")
    ran = run("generate", "--prompt-file", "prompts.txt")
    assert ran.engine is not None
    assert [params.prompt for params in ran.engine.submitted] == ["a cat", "#1 dad", "a dog"]


@pytest.mark.parametrize("columns", [40, 60, 90, 200])
def test_help_cuts_no_option_short_and_tells_limits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = CliRunner().invoke(app, ["serve", "--help"]).output
    assert all(flag.option in shown for flag in server_flags())
    assert max(map(len, shown.splitlines())) <= columns
    assert "from 0 to 65535" in " ".join(shown.replace("│", " ").split())


def test_prompts_come_from_standard_input(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\na dog\u2028at night\n"))
    ran = run("generate", "--prompt-file", "-")
    assert ran.engine is not None and [each.prompt for each in ran.engine.submitted] == ["a cat", "a dog\u2028at night"]


def test_drawn_seed_is_shown_and_sampling_values_reach_the_request(run: Callable[..., Ran]) -> None:
    ran = run("generate", "a cat", "--num-inference-steps", "4", "--guidance-scale", "1.5")
    assert ran.engine is not None
    (params,) = ran.engine.submitted
    assert (params.num_inference_steps, params.guidance_scale) == (4, 1.5)
    assert params.seed is not None and str(params.seed) in ran.out


def test_one_failed_request_does_not_stop_the_others(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run("generate", "a cat", "[fail] a dog", "a fox")
    assert ran.code == 1
    assert sorted(os.listdir(tmp_path / "ditrelay-output")) == ["1-a-cat.png", "3-a-fox.png"]
    assert "failed 2: [fail] a dog: the stage broke" in ran.out
    assert "2 of 3 done" in ran.out


def test_file_that_cannot_be_written_is_a_failed_request(run: Callable[..., Ran], tmp_path: Path) -> None:
    class Removing(FakeEngine):
        def start(self) -> None:
            os.rmdir(tmp_path / "cats")
            (tmp_path / "cats").write_text("in the way")

    ran = run("generate", "a cat", "--output", "cats", engine_class=Removing)
    assert ran.code == 1 and "failed 1: a cat: " in ran.out


@pytest.mark.parametrize("output", ["/proc/cat.png", "/proc", "x" * 300 + ".png"])
def test_an_output_that_cannot_be_written_to_is_refused_before_anything_starts(
    run: Callable[..., Ran], output: str
) -> None:
    ran = run("generate", "a cat", "--output", output)
    assert ran.code == 2 and ran.err.startswith("error: --output: cannot write to ") and ran.err.count("\n") == 1
    assert ran.engine is not None and not ran.engine.started


def test_a_picture_that_finds_no_room_leaves_no_part_of_a_file_and_says_which(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    class NoRoom(FakeEngine):
        def start(self) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        ran = run("generate", "a cat", engine_class=NoRoom)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ran.code == 1 and "failed 1: a cat: cannot write a-cat.png: File too large" in ran.out
    assert not os.listdir(tmp_path)


def test_two_runs_that_choose_the_same_name_both_keep_their_picture(run: Callable[..., Ran], tmp_path: Path) -> None:
    class Beside(FakeEngine):
        def start(self) -> None:
            (tmp_path / "a-cat.png").write_text("of another run")
            (tmp_path / "a-cat-2.png").symlink_to("nowhere")

    ran = run("generate", "a cat", "--seed", "3", engine_class=Beside)
    assert ran.code == 0 and "wrote a-cat-3.png" in ran.out
    assert (tmp_path / "a-cat-3.png").read_bytes() == png(3)
    assert (tmp_path / "a-cat.png").read_text() == "of another run"


def test_pictures_that_are_written_do_not_stay_in_memory(tmp_path: Path) -> None:
    order = Order(("a cat", "a dog"), output=tmp_path, sampling={"seed": 1})
    done = generate(ServerArgs(log_level="warning"), order, FakeEngine)  # type: ignore[arg-type]
    assert [outcome.result.media for outcome in done.outcomes if outcome.result] == [b"", b""]
    assert [outcome.job.path.read_bytes() for outcome in done.outcomes] == [png(1), png(2)]


def test_bytes_that_are_no_text_are_one_line_and_exit_code_2(run: Callable[..., Ran]) -> None:
    ran = run("generate", "a cat", "caf\udce9")
    assert ran.code == 2 and ran.err.startswith("error: PROMPT: number 2: it has bytes that are not UTF-8")
    assert ran.engine is not None and not ran.engine.started


def test_report_shows_stages_transfers_overlap_and_rate(run: Callable[..., Ran]) -> None:
    ran = run("generate", "a cat", "a dog", "--seed", "3")
    for heading in ("prompt", "seed", "waiting", "encode", "to DiT", "denoise", "to dec.", "decode", "exposed"):
        assert heading in ran.out
    for value in ("0.250", "0.004", "1.500", "0.125", "1.900", "requests/s", "overlapped for 42%"):
        assert value in ran.out


def test_report_says_whether_disaggregation_pays_off_where_there_is_a_choice(run: Callable[..., Ran]) -> None:
    ran = run("generate", "a cat", "a dog", "--enable-disagg", "--num-gpus", "2", "--device", "cpu")
    said = " ".join(ran.out.split())
    assert "1 DiT + 1 non-DiT can make 0.5 requests/s at most; 2 with all roles 0.8 (60% more)" in said
    assert "not for requests a second." in said
    assert "at most" not in run("generate", "a cat", "a dog").out


def test_report_fits_eighty_columns_and_shows_every_number() -> None:
    params = SamplingParams(prompt="a red apple on a blue background", seed=2**31 - 1)
    jobs = [Job(i, params, Path("x.png")) for i in range(12)]
    outcomes = [Outcome(job, result_of("r", params)) for job in jobs]
    console = Console(file=io.StringIO(), width=80)
    console.print(report_table(Run(12, tuple(outcomes), 1.0, 0.5), 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    row = next(line for line in lines if "2147483647" in line)
    assert row.split()[-8:] == ["0.000", "0.250", "0.004", "1.500", "0.000", "0.125", "0.000", "1.900"]
    assert len(row) <= 80 and "a red" in row


@pytest.mark.parametrize("columns", [32, 40, 60])
def test_report_of_a_narrow_terminal_leaves_columns_out_and_names_them(columns: int) -> None:
    params = SamplingParams(prompt="a red apple on a blue background", seed=7)
    console = Console(file=io.StringIO(), width=columns)
    outcome = Outcome(Job(0, params, Path("x.png")), result_of("r", params))
    console.print(report_table(Run(1, (outcome,), 1.0, 0.5), columns))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= columns for line in shown.splitlines())
    assert "…" not in shown.split("a red")[0] and "1.500" in shown and "1.900" in shown
    assert "no room for: exposed" in shown


def test_pipe_gets_short_lines_without_control_characters(run: Callable[..., Ran]) -> None:
    ran = run("generate", "a \x1b[31mcat", "[fail] b\x07")
    assert ran.err.splitlines()[0] == "starting 1 worker"
    assert "[1/2] done in 1.90 s: a  [31mcat" in ran.err
    assert all(char.isprintable() or char == "\n" for char in ran.out + ran.err)


def test_requests_past_the_queue_limit_wait_their_turn(run: Callable[..., Ran]) -> None:
    class Small(FakeEngine):
        """Takes two at a time; the others are refused until those have ended."""

        def submit(self, params: SamplingParams) -> Ticket:
            if self.room == 0:
                self.room = self.args.max_queue
                raise QueueFull(self.args.max_queue, 1)
            self.room -= 1
            return super().submit(params)

    ran = run("generate", *(f"cat {i}" for i in range(5)), "--max-queue", "2", engine_class=Small)
    assert ran.code == 0 and ran.engine is not None
    assert [each.prompt for each in ran.engine.submitted] == [f"cat {i}" for i in range(5)]


def test_engine_that_does_not_start_is_one_line_and_exit_code_1(run: Callable[..., Ran]) -> None:
    class Broken(FakeEngine):
        def start(self) -> None:
            raise StartupError("rank 0 could not start:\nout of memory")

    ran = run("generate", "a cat", engine_class=Broken)
    assert ran.code == 1 and ran.err.splitlines()[-1] == "error: rank 0 could not start: out of memory"
    assert ran.engine is not None and ran.engine.closed


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Where the shell runs the tests in the background, they would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_cancels_what_runs_and_exits_130_soon(run: Callable[..., Ran], tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "ditrelay-output/1-a-cat.png").exists():
            time.sleep(0.01)
        time.sleep(0.5)  # the file is there before its outcome is noted
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    ran = run("generate", "a cat", "[hang] a dog")
    assert ran.code == 130 and time.monotonic() - began < 5
    assert ran.engine is not None and ran.engine.cancelled == ["r2"] and ran.engine.closed
    assert "1 of 2 done" in ran.out and "wrote ditrelay-output/1-a-cat.png" in ran.out


def test_modules_in_the_current_folder_are_not_taken_for_pythons_own(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('taken for the queue of Python')")
    (tmp_path / "bin").mkdir()
    installed = tmp_path / "bin" / "ditrelay"
    installed.write_text("import sys; from ditrelay.cli import main; sys.exit(main())")
    command = [sys.executable, str(installed), "generate", "a cat", "--model-path", "builtin:timed"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a-cat.png").is_file()


def test_a_prompt_that_the_terminals_encoding_lacks_is_reported_all_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ditrelay", "generate", "кот", "--model-path", "builtin:timed"]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert rb"wrote \u043a\u043e\u0442.png" in done.stdout and (tmp_path / "кот.png").is_file()


def test_cancelled_request_counts_as_failed(run: Callable[..., Ran]) -> None:
    class Cancelling(FakeEngine):
        def finish(self, ticket: Ticket, params: SamplingParams) -> None:
            ticket.fail(RequestCancelled("cancelled"), RequestState.CANCELLED, 0.0)

    assert run("generate", "a cat", engine_class=Cancelling).code == 1


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A red apple!", "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("猫", "猫"),
        ("?!", "output"),
        ("x" * 99, "x" * 40),
    ],
)
def test_slug_is_a_plain_short_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


# ---------------------------------------------------------------- displays


def rendered(display: LiveDisplay, console: Console) -> str:
    with console.capture() as capture:
        console.print(display.render())
    return capture.get()


def test_live_table_shows_each_request_with_its_state_and_steps() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    display = LiveDisplay(console)
    with display.running(["a cat", "[red]a dog[/red]", "a fox", "an owl"]):
        display.update(0, Progress("r", RequestState.DENOISING, 3, 8))
        display.ended(2, 1.5, None)
        display.ended(3, 0.0, "the stage broke")
    text = rendered(display, console)
    for shown in ("a cat", "denoising", "3/8", "[red]a dog[/red]", "queued", "1.50 s", "failed", "the stage broke"):
        assert shown in text
    assert "1 done, 1 failed, 1 running, 1 queued" in text


def test_live_table_keeps_to_the_height_of_the_terminal_and_shows_what_runs() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=10)
    display = LiveDisplay(console)
    with display.running([f"cat {i}" for i in range(100)]):
        display.update(77, Progress("r", RequestState.ENCODING))
    text = rendered(display, console)
    assert len(text.splitlines()) <= 9 and "cat 77" in text and "99 queued" in text


def test_plain_display_speaks_of_a_long_request_now_and_then() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.running(["a cat"]):
        for second in range(0, 30):
            display.update(0, Progress("r", RequestState.DENOISING, second, 50, at=time.monotonic() + second))
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 3 and lines[0].startswith("denoising step ")


# ---------------------------------------------------------------- other commands


def test_version_and_help_are_quick_and_import_no_torch() -> None:
    code = (
        "import sys; from ditrelay.cli import main; codes = [main(['--version']), main(['generate', '--help'])];"
        "sys.exit(codes != [0, 0] or 'torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ditrelay {__version__}\n")


def test_importing_the_package_imports_no_torch_and_gives_its_names() -> None:
    code = (
        "import sys, ditrelay; assert 'torch' not in sys.modules; ditrelay.ServerArgs; ditrelay.SamplingParams;"
        "ditrelay.errors.ConfigError; assert 'torch' not in sys.modules; assert 'Engine' in dir(ditrelay)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_launch_server_is_serve() -> None:
    direct = ditrelay("serve", "--port", "x")
    launched = ditrelay("--port", "x", module="ditrelay.launch_server")
    assert (direct.returncode, direct.stderr) == (launched.returncode, launched.stderr)
    assert launched.returncode == 2 and launched.stderr.startswith("error: --port: ")


def test_serve_prints_the_plan_and_starts_the_server(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    served: queue.SimpleQueue[ServerArgs] = queue.SimpleQueue()
    monkeypatch.setattr("ditrelay.server.app.serve", lambda args: served.put(args) or 0)
    ran = run("serve", "--enable-disagg", "--num-gpus", "4", "--sp-degree", "2", "--device", "cpu")
    assert ran.code == 0
    assert "0-1    dit      0        2 x 1    3" in ran.out
    assert served.get_nowait() == ServerArgs(enable_disagg=True, num_gpus=4, sp_degree=2, device="cpu")


def test_no_command_shows_the_help(run: Callable[..., Ran]) -> None:
    ran = run()
    assert ran.code == 0 and "generate" in ran.out and "doctor" in ran.out


def test_doctor_shows_versions_devices_and_features(run: Callable[..., Ran]) -> None:
    ran = run("doctor", "--no-self-check")
    assert ran.code == 0
    for shown in ("torch", "diffusers", "cores usable", "GiB", "torch_sdpa", "--sp-degree", "flux"):
        assert shown in ran.out


def self_check_with(script: str, monkeypatch: pytest.MonkeyPatch, timeout: float = 30.0) -> list[doctor.Check]:
    """The self-check with a script of ours in place of torchrun."""
    ran = doctor._run
    monkeypatch.setattr(doctor, "_run", lambda _, limit: ran([sys.executable, "-c", script], limit))
    return doctor.self_check(2, timeout)


def test_doctor_tells_each_passed_and_failed_test(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "print('  ✓ PASSED: Basic'); print('  ✗ FAILED: Batch'); raise SystemExit(1)"
    checks = self_check_with(script, monkeypatch)
    assert [(check.name, check.ok) for check in checks] == [("Basic", True), ("Batch", False), ("communication", False)]
    assert "exit code 1" in checks[-1].value


def test_doctor_takes_no_module_in_the_current_folder_for_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('taken for the random of Python')")
    monkeypatch.chdir(tmp_path)
    checks = doctor.self_check(2, 100)
    assert all(check.ok for check in checks), checks


def test_doctor_ends_a_self_check_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = self_check_with("import time; time.sleep(60)", monkeypatch, timeout=0.5)
    assert check.ok is False and "no end within 0.5 s" in check.value


def test_doctor_fails_where_a_check_failed(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [doctor.Check("communication", "exit code 1", ok=False)]
    monkeypatch.setattr(doctor, "self_check", lambda *_: failed)
    assert run("doctor").code == 1
