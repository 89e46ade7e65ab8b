"""The tools that train the built-in image model: data, scenes, split, batched pass, trainer, checker, a training."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image, ImageDraw

from tools.train_emoji import evaluate, prepare, train_image
from tools.train_emoji.checker import Checker
from tools.train_emoji.dataset import EmojiSet, load_emoji
from tools.train_emoji.decoder import Finish
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.export import ImageModel, export_image_model, load_image_model
from tools.train_emoji.image_model import BatchedModel, make_text_encoder, make_transformer, unused_parameters
from tools.train_emoji.layouts import (
    SCENES_AT_ONCE,
    TESTED,
    Scene,
    SceneMaker,
    Thing,
    is_held_out,
    make_table,
    plain_background,
)
from tools.train_emoji.measures import features, frechet_distance, sharpness
from tools.train_emoji.prompts import MIX, choose_prompts, single_scene, unjittered
from tools.train_emoji.tokens import make_tokenizer, tokenize
from tools.train_emoji.training import Budget, Journal, Options, Schedule, Trainer
from tools.train_emoji.vae import make_vae
from tools.train_emoji.words import COLOURS

CPU, SIDE = torch.device("cpu"), 32
SHAPES = {
    "flag": [(8, 60), (8, 4), (58, 18), (16, 32), (16, 60)],
    "wedge": [(4, 56), (60, 56), (60, 12)],
    "arrow": [(4, 26), (34, 26), (34, 8), (60, 32), (34, 56), (34, 38), (4, 38)],
    "boot": [(8, 4), (26, 4), (26, 40), (58, 44), (58, 60), (8, 60)],
    "kite": [(32, 2), (54, 24), (32, 62), (10, 24)],
    "crane": [
        (2, 12),
        (62, 12),
        (62, 22),
        (54, 22),
        (54, 58),
        (46, 58),
        (46, 22),
        (18, 22),
        (18, 58),
        (10, 58),
        (2, 22),
    ],
    "star": [(32, 2), (40, 24), (62, 24), (44, 38), (50, 60), (32, 46), (14, 60), (20, 38), (2, 24), (24, 24)],
    "tower": [(22, 62), (22, 18), (32, 2), (42, 18), (42, 62)],
}
PAINTS = ("firebrick", "seagreen", "goldenrod", "slateblue", "teal", "sienna", "orchid", "gray")


def _picture(name: str) -> Image.Image:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).polygon(SHAPES[name], fill=PAINTS[list(SHAPES).index(name)])
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of eight made-up emoji, packed by prepare.py from packages laid out as npm does it."""
    modules = tmp_path_factory.mktemp("node_modules")
    pictures = modules / "@lobehub" / "fluent-emoji-3d" / "assets"
    for folder in (pictures, modules / "unicode-emoji-json", modules / "emojilib" / "dist"):
        folder.mkdir(parents=True)
    names, words = {}, {}
    for emoji, name in zip("abcdefgh", SHAPES, strict=True):
        _picture(name).save(pictures / f"{ord(emoji):x}.webp", lossless=True)
        names[emoji] = {"name": name.capitalize(), "group": "Objects"}
        words[emoji] = [name, "thing", f"{name}_like"]
    names["z"] = {"name": "flag: Nowhere", "group": "Flags"}
    (modules / "unicode-emoji-json" / "data-by-emoji.json").write_text(json.dumps(names))
    (modules / "emojilib" / "dist" / "emoji-en-US.json").write_text(json.dumps(words))
    path = modules / "emoji.npz"
    prepare.main([str(modules), str(path), "--size", "64"])
    return path


@pytest.fixture(scope="module")
def emoji(data: Path) -> EmojiSet:
    return load_emoji(data)


@pytest.fixture(scope="module")
def lab(emoji: EmojiSet) -> evaluate.Lab:
    drawer = Drawer(emoji.pictures, CPU, 64)
    return evaluate.Lab(emoji, drawer, Checker(drawer, len(emoji)))


# ------------------------------------------------------------------ data


def test_packing_keeps_names_and_only_the_words_that_mean_one_emoji(emoji: EmojiSet) -> None:
    assert [one.name for one in emoji.emoji] == list(SHAPES)
    assert all(one.rare == (f"{one.name} like",) for one in emoji.emoji)


def test_packed_pictures_fill_their_frame_and_are_premultiplied(emoji: EmojiSet) -> None:
    assert emoji.pictures.shape == (8, 64, 64, 4)
    opaque = emoji.pictures[..., 3] > prepare.VISIBLE
    for across, down in zip(opaque.any(1), opaque.any(2), strict=True):
        assert max(across.sum(), down.sum()) == 64
    assert (emoji.pictures[..., :3] <= emoji.pictures[..., 3:]).all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("T-Rex", "t-rex"), ("piñata", "pinata"), ("a_b: c!", "a b c")],
)
def test_names_are_written_as_a_person_types_them(given: str, expected: str) -> None:
    assert prepare.plain(given) == expected


# ------------------------------------------------------------------ scenes and the split


def test_training_never_shows_a_combination_that_is_kept_for_the_evaluation(emoji: EmojiSet) -> None:
    maker = SceneMaker(emoji.emoji, seed=1)
    shown = {c for _ in range(4000) for c in maker.scene().combinations(emoji.emoji)}
    assert {c[0] for c in shown} == {"pair", "colour", "count", "place"}
    assert not [c for c in shown if is_held_out(c)]


def test_every_held_out_prompt_shows_a_combination_that_training_never_shows(emoji: EmojiSet) -> None:
    prompts = choose_prompts(emoji, 3, 40)
    assert {scene.kind for scene in prompts.held_out} == set(MIX)
    for scene in prompts.held_out:
        tested = [c for c in scene.combinations(emoji.emoji) if c[0] == TESTED[scene.kind]]
        assert any(map(is_held_out, tested)), scene.caption


def test_every_model_is_asked_the_same(emoji: EmojiSet) -> None:
    assert choose_prompts(emoji, 3, 40) == choose_prompts(emoji, 3, 40)


def test_a_longer_table_of_a_seed_begins_with_a_shorter_one(emoji: EmojiSet) -> None:
    short, long = (make_table(emoji.emoji, count, seed=1) for count in (200, SCENES_AT_ONCE + 1))
    assert len(long) == SCENES_AT_ONCE + 1 and long.captions[:200] == short.captions
    assert np.array_equal(long.things[:200], short.things)
    assert make_table(emoji.emoji, 200, seed=2).captions != short.captions


def test_without_its_jitter_a_thing_stands_at_the_spot_of_its_kind(emoji: EmojiSet) -> None:
    maker = SceneMaker(emoji.emoji, seed=5)
    for kind in MIX:
        scene = maker.scene(kind)
        for thing, placed in zip(scene.things, unjittered(scene).things, strict=True):
            moved = (placed.x - thing.x, placed.y - thing.y, placed.scale - thing.scale)
            assert max(map(abs, moved)) < 0.05 and (placed.emoji, placed.tint) == (thing.emoji, thing.tint)


# ------------------------------------------------------------------ the pass for training


def _small_model(shift: float = 2.0) -> ImageModel:
    """An untrained model whose every part has a say: what starts at zero could hide a fault."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["a red boot", "two flags above a kite"] * 20, 300)
    text_encoder = make_text_encoder(len(tokenizer), width=64, layers=3, hidden=96)
    transformer = make_transformer(64, dim=64, layers=2)
    for module in (text_encoder, transformer):
        unused = {id(parameter) for parameter in unused_parameters(module)}
        for parameter in module.parameters():
            if not parameter.any() and id(parameter) not in unused:
                torch.nn.init.normal_(parameter, std=0.1)
    return ImageModel(make_vae(SIDE, (16, 16, 16)), text_encoder, tokenizer, transformer, shift)


@torch.no_grad()
def test_an_exported_model_draws_in_the_stock_pipeline_what_the_batched_pass_draws(tmp_path: Path) -> None:
    export_image_model(_small_model(shift=1.7), tmp_path / "model")
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions, start = ["a red boot", "two flags above a kite"], torch.randn(2, 4, 16, 16)
    expected = pipeline(
        list(captions),
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=start.clone(),
        output_type="latent",
    ).images

    model = load_image_model(tmp_path / "model")
    batched = BatchedModel(model.transformer, model.text_encoder, 8)
    tokens, lengths = tokenize(model.tokenizer, [*captions, "", ""])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=model.shift)
    scheduler.set_timesteps(sigmas=[1, 2 / 3, 1 / 3])
    sigmas, found = scheduler.sigmas.tolist(), start
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        both = batched(found.repeat(2, 1, 1, 1), torch.full((4,), 1 - now), tokens.long(), lengths.long())
        told, untold = both.chunk(2)
        found = found + (now - then) * (told + 2 * (told - untold))
    assert (expected - start).abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_every_parameter_that_is_trained_gets_a_gradient_and_no_other() -> None:
    model = _small_model()
    tokens, lengths = tokenize(model.tokenizer, ["a red boot"])
    batched = BatchedModel(model.transformer, model.text_encoder, SIDE // 8)
    latents = torch.randn(1, 4, SIDE // 4, SIDE // 4)
    batched(latents, torch.tensor([0.5]), tokens.long(), lengths.long()).square().sum().backward()
    for name, parameter in batched.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_captions_are_read_without_case_or_accents_and_cut_to_32_tokens() -> None:
    tokenizer = make_tokenizer(["a red boot"] * 20, 300)
    rows, lengths = tokenize(tokenizer, ["A Réd BOOT", "a red boot", "", "boot " * 60])
    assert torch.equal(rows[0], rows[1])
    assert lengths.tolist() == [lengths[0], lengths[0], 2, 32]
    assert not rows[2, 2:].any()


# ------------------------------------------------------------------ the trainer


class _Line:
    """Fits a matrix to another one; validation gives ``losses`` first, and training fails at the steps ``broken``."""

    def __init__(self, folder: Path, losses: tuple[float, ...] = (), seed: int = 0, broken: range = range(0)) -> None:
        torch.manual_seed(seed)
        self.module = torch.nn.Linear(6, 6)
        self.losses, self.broken = list(losses), broken
        options = Options(Schedule(1e-2, warmup=0.0), report_every=1e9, validate_every=0)
        self.trainer = Trainer("line", {"line": self.module}, options, folder, Journal())
        self.seen: list[torch.Tensor] = []

    def loss(self) -> torch.Tensor:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(self.trainer.steps))
        failing = float("nan") if self.trainer.steps in self.broken else 1.0
        return (self.module(inputs) - inputs).square().mean() * failing

    def validate(self) -> float:
        self.seen.append(self.module.weight.detach().clone())
        return self.losses.pop(0) if self.losses else self.loss().item()

    def run(self, total_seconds: float) -> None:
        deadline = time.monotonic() + 60
        self.trainer.run(self.loss, self.validate, Budget(total_seconds, deadline))


def test_a_resumed_trainer_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    first = _Line(tmp_path)
    first.run(0.05)
    second = _Line(tmp_path, seed=1)
    assert second.trainer.resume()
    assert (second.trainer.steps, second.trainer.progress) == (first.trainer.steps, 1.0)
    for line in (first, second):
        line.trainer.progress = 0.5
        for _ in range(3):
            line.trainer._step(line.loss)
    assert torch.equal(first.module.weight, second.module.weight)
    for one, other in zip(first.trainer.ema.means, second.trainer.ema.means, strict=True):
        assert torch.equal(one, other)


def test_there_is_nothing_to_resume_in_a_new_folder(tmp_path: Path) -> None:
    assert not _Line(tmp_path / "new").trainer.resume()


def test_the_best_weights_are_kept_not_the_last(tmp_path: Path) -> None:
    line = _Line(tmp_path, losses=(0.5, 0.2, *[0.3] * 1000))
    line.run(0.05)
    assert len(line.seen) > 3 and line.trainer.best_loss == 0.2
    line.trainer.use_best()
    assert torch.equal(line.module.weight, line.seen[1])


def test_the_weights_that_a_training_starts_with_are_kept_where_it_makes_them_worse(tmp_path: Path) -> None:
    line = _Line(tmp_path, losses=(0.1, *[0.3] * 1000))
    before = line.module.weight.detach().clone()
    line.run(0.05)
    assert not torch.equal(line.module.weight, before)
    line.trainer.use_best()
    assert torch.equal(line.module.weight, before)


def test_a_training_that_diverges_goes_back_to_its_best_weights_at_half_the_rate(tmp_path: Path) -> None:
    line = _Line(tmp_path, broken=range(15, 20))
    line.run(0.05)
    assert line.trainer.rate_scale == 0.5
    assert torch.isfinite(line.module.weight).all()


def test_a_training_that_diverges_at_once_goes_back_to_where_it_started(tmp_path: Path) -> None:
    line = _Line(tmp_path, broken=range(5, 9))
    line.run(0.05)
    assert line.trainer.rate_scale == 0.5
    assert torch.isfinite(line.module.weight).all()


def test_a_training_whose_first_weights_give_no_finite_loss_does_not_begin(tmp_path: Path) -> None:
    line = _Line(tmp_path, losses=(float("nan"),))
    with pytest.raises(RuntimeError, match="before its first step"):
        line.run(0.05)
    assert line.trainer.steps == 0


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(1.0, warmup=0.1, flat_until=0.4)
    rates = [schedule.rate(progress) for progress in (0.0, 0.05, 0.1, 0.39, 0.7, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.501, 0.002], abs=1e-3)


# ------------------------------------------------------------------ checker and measures


def test_the_checker_reads_objects_colours_counts_and_places_of_real_pictures(lab: evaluate.Lab) -> None:
    figures = evaluate.check_checker(lab, 60)
    assert figures["single objects"]["object right"] == 1
    held_out = figures["held-out scenes"]
    assert min(held_out["object right"], held_out["colour right"]) >= 0.97
    assert (held_out["count right"], held_out["place right"]) == (1, 1)


def test_the_checker_says_so_when_a_picture_shows_something_else(lab: evaluate.Lab) -> None:
    red, blue = (1 + list(COLOURS).index(name) for name in ("red", "blue"))
    asked = Scene("one", "", (Thing(0, 0, 0, 0.84, 0, red),), plain_background())
    shown = replace(asked, things=(Thing(3, 0, 0, 0.84, 0, blue),))
    assert evaluate.mark(lab.checker, asked, lab.draw([shown])[0])["object"] == [False]
    painted = replace(asked, things=(asked.things[0]._replace(tint=blue),))
    marks = evaluate.mark(lab.checker, asked, lab.draw([painted])[0])
    assert (marks["object"], marks["colour"]) == ([True], [False])


def test_an_empty_picture_is_right_about_nothing(lab: evaluate.Lab) -> None:
    marks = evaluate.mark(lab.checker, single_scene(lab.emoji, 1), torch.ones(3, 64, 64) * 0.2)
    assert not evaluate.all_right(marks)


def test_a_wrong_count_or_place_is_seen(lab: evaluate.Lab) -> None:
    three = _held_scene(lab, "several", 3)
    assert lab.checker.count(lab.draw([three])[0], three.things[0], three.background) == 3
    moved = Scene("placed", "", (Thing(0, 0.5, 0, 0.46),), plain_background(), "left")
    assert evaluate.mark(lab.checker, moved, lab.draw([moved])[0])["place"] == [False]


def _held_scene(lab: evaluate.Lab, kind: str, count: int) -> Scene:
    maker = SceneMaker(lab.emoji.emoji, seed=2)
    while True:
        scene = maker.scene(kind)  # type: ignore[arg-type]
        if len(scene.things) == count:
            return scene


def test_the_frechet_distance_is_nothing_to_itself_and_grows_with_the_difference(lab: evaluate.Lab) -> None:
    maker = SceneMaker(lab.emoji.emoji, seed=3)
    pictures = lab.draw([maker.scene() for _ in range(120)])
    real = features(pictures)
    same, paler, grey = (frechet_distance(features(p), real) for p in (pictures, pictures * 0.8, pictures * 0))
    assert abs(same) < 1e-3 < paler < grey


def test_blurred_pictures_have_fainter_edges(lab: evaluate.Lab) -> None:
    pictures = lab.draw([single_scene(lab.emoji, k) for k in range(4)])
    blurred = torch.nn.functional.avg_pool2d(pictures, 9, stride=1, padding=4, count_include_pad=False)
    assert sharpness(pictures, pictures) == 1
    assert sharpness(blurred, pictures) < 0.95


# ------------------------------------------------------------------ one whole training


def _train(data: Path, work: Path, *more: str) -> dict[str, float]:
    flags = "--size 32 --pool 64 --validation-scenes 16 --vocabulary 300 --text-layers 2 --vae-batch 2 --batch 2"
    flags += " --vae-seconds 0.2 --seconds 0.2 --command-seconds 120 --reserve-seconds 0 --no-samples"
    train_image.main(["--data", str(data), "--work", str(work), *flags.split(), *more])
    state: dict[str, float] = json.loads((work / "transformer-training" / "state.json").read_text())
    return state


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_image, "make_transformer", lambda: make_transformer(64, dim=64, layers=2))
    monkeypatch.setattr(train_image, "make_text_encoder", partial(make_text_encoder, width=64, hidden=96))
    monkeypatch.setattr(train_image, "make_vae", partial(make_vae, channels=(16, 16, 16)))
    monkeypatch.setattr(train_image, "Finish", partial(Finish, batch=4))
    # The decoder's last touch would take all the time to the command's end.
    monkeypatch.setattr(train_image, "Budget", lambda seconds, deadline, finish=False: Budget(seconds, deadline))


@pytest.mark.usefixtures("small_networks")
def test_a_second_command_goes_on_and_its_model_can_be_measured(data: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    first = _train(data, work)
    file = work / "transformer-training" / "state.json"
    file.write_text(json.dumps(first | {"progress": 0.5}))
    second = _train(data, work, "--seed", "1", "--decoder-seconds", "0.2")
    assert second["progress"] == 1 and second["steps"] > first["steps"]

    flags = "--size 32 --singles 2 --held-out 20 --steps 2"
    evaluate.main(["--model", str(work / "model"), "--data", str(data), "--out", str(out), *flags.split()])
    figures = json.loads((out / "image.json").read_text())["2 steps"]
    assert figures["held-out scenes"]["pictures"] == 20
    assert 0 <= figures["held-out scenes"]["everything right"] < 1
    assert "| 2 steps |" in (out / "image.md").read_text()
    assert Image.open(out / "samples-2.png").width > 6 * 32
