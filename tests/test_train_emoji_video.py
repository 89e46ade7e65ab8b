"""The tools that train the built-in video model: motions, the split, the passes for training, one whole training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tools.train_emoji import finish_video, train_video
from tools.train_emoji.checker import Checker
from tools.train_emoji.dataset import EmojiSet, load_emoji
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.evaluate_video import add_up, choose_clips, mark
from tools.train_emoji.frames import decode_latents, encode_clips
from tools.train_emoji.layouts import Background, Scene, Thing, is_held_out, plain_background
from tools.train_emoji.motions import (
    MOTION_NAMES,
    MOTIONS,
    Clip,
    ClipDrawer,
    ClipMaker,
    make_clip_table,
    motion_table,
    tabulate_clips,
)
from tools.train_emoji.video_checker import COMPARED_SIZE, ClipChecker, clearest_frame
from tools.train_emoji.video_export import write_animation
from tools.train_emoji.video_model import (
    CHANNELS,
    FRAMES,
    PROMPT_TOKENS,
    TRIAL_WIDTHS,
    ClipDenoiser,
    Widths,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    tokenize,
)

CPU = torch.device("cpu")
SIDE = 48
SHAPES = {
    "flag": [(8, 60), (8, 4), (58, 18), (16, 32), (16, 60)],
    "wedge": [(4, 56), (60, 56), (60, 12)],
    "arrow": [(4, 26), (34, 26), (34, 8), (60, 32), (34, 56), (34, 38), (4, 38)],
    "boot": [(8, 4), (26, 4), (26, 40), (58, 44), (58, 60), (8, 60)],
}
WEIGHTS = {part: "diffusion_pytorch_model.safetensors" for part in ("vae", "transformer")} | {
    "text_encoder": "model.safetensors"
}
PAINTS = ("firebrick", "seagreen", "goldenrod", "slateblue")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as prepare.py writes it, of four made-up emoji."""
    pictures = []
    for corners, paint in zip(SHAPES.values(), PAINTS, strict=True):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        ImageDraw.Draw(image).polygon(corners, fill=paint)
        pictures.append(np.asarray(image))
    stacked = np.stack(pictures)
    rows = [{"name": name, "group": "Objects", "alias": [], "extra": []} for name in SHAPES]
    path = tmp_path_factory.mktemp("data") / "emoji.npz"
    differences = np.diff(stacked, axis=2, prepend=np.zeros_like(stacked[:, :, :1])).astype(np.uint8)
    np.savez_compressed(path, items=np.frombuffer(json.dumps(rows).encode(), np.uint8), pics_3d=differences)
    return path


@pytest.fixture(scope="module")
def emoji(data: Path) -> EmojiSet:
    return load_emoji(data)


def _draw(emoji: EmojiSet, motion: str, size: int = SIDE, background: Background | None = None) -> torch.Tensor:
    scene = Scene("one", "", (Thing(0, 0, 0, MOTIONS[motion].scale),), background or plain_background())
    table = tabulate_clips([Clip(scene, motion)])
    drawer = ClipDrawer(Drawer(emoji.pictures, CPU, size), FRAMES)
    return drawer.draw(*(torch.from_numpy(array) for array in (table.things, table.backgrounds, table.motions)))[0]


def _centre(frame: torch.Tensor) -> tuple[float, float]:
    """Where the thing on white is, in pixels from the left and from the top."""
    weight = (1 - frame).sum(0)
    across, down = torch.arange(frame.shape[2]), torch.arange(frame.shape[1])
    return float((weight.sum(0) * across).sum() / weight.sum()), float((weight.sum(1) * down).sum() / weight.sum())


# ------------------------------------------------------------------ motions


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_a_straight_motion_goes_where_its_name_says(emoji: EmojiSet, motion: str, axis: int, sign: int) -> None:
    clip = _draw(emoji, motion)
    first, last = _centre(clip[:, 0]), _centre(clip[:, -1])
    assert (last[axis] - first[axis]) * sign > SIDE / 4
    assert abs(last[1 - axis] - first[1 - axis]) < 1


def test_no_motion_leaves_the_frame() -> None:
    offsets = motion_table(FRAMES)
    for name, motion in MOTIONS.items():
        reach = np.abs(offsets[MOTION_NAMES.index(name), :, :2]).max()
        assert reach + motion.scale <= 1, name


def test_what_appears_is_not_there_at_first_and_what_vanishes_is_gone_at_last(emoji: EmojiSet) -> None:
    appearing, vanishing = _draw(emoji, "appear"), _draw(emoji, "vanish")
    assert appearing[:, 0].min() == 1 and appearing[:, -1].min() < 0.5
    assert vanishing[:, -1].min() == 1 and vanishing[:, 0].min() < 0.5


def test_a_spin_ends_as_it_began_and_is_upside_down_in_the_middle(emoji: EmojiSet) -> None:
    clip = _draw(emoji, "spin")
    assert torch.allclose(clip[:, 0], clip[:, -1], atol=0.02)
    assert (clip[:, FRAMES // 2].flip(1, 2) - clip[:, 0]).abs().mean() < 0.05


def test_every_motion_has_a_frame_where_its_thing_is_whole_and_upright() -> None:
    offsets = motion_table(FRAMES)
    for name in MOTION_NAMES:
        _, _, scale, angle, opacity = offsets[MOTION_NAMES.index(name), clearest_frame(name, FRAMES)]
        assert (scale, opacity) == (1, 1) and angle % 360 == pytest.approx(0, abs=1e-3), name


def test_chosen_frames_are_the_same_as_in_the_whole_clip(emoji: EmojiSet) -> None:
    table = make_clip_table(emoji.emoji, 6, seed=2)
    drawer = ClipDrawer(Drawer(emoji.pictures, CPU, SIDE), FRAMES)
    arrays = [torch.from_numpy(array) for array in (table.things, table.backgrounds, table.motions)]
    chosen = torch.tensor([[0, 1], [2, 3], [7, 8], [4, 5], [6, 7], [3, 4]])
    whole, part = drawer.draw(*arrays), drawer.draw(*arrays, chosen)
    for k, (first, last) in enumerate(chosen.tolist()):
        assert torch.equal(part[k], whole[k][:, first : last + 1])


def test_the_backgrounds_of_a_clip_stay(emoji: EmojiSet) -> None:
    clip = _draw(emoji, "grow", background=plain_background((0, 0, 255)))
    assert torch.equal(clip[:, 0, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert torch.equal(clip[:, 0, 0, 0], clip[:, -1, 0, 0])


# ------------------------------------------------------------------ the split


def test_training_never_shows_an_emoji_in_a_motion_that_is_kept_for_the_evaluation(emoji: EmojiSet) -> None:
    maker = ClipMaker(emoji.emoji, seed=3)
    shown = {combination for _ in range(2000) for combination in maker.clip().combinations(emoji.emoji)}
    assert not [combination for combination in shown if is_held_out(combination)]
    assert {c[2] for c in shown if c[0] == "motion"} == set(MOTION_NAMES)


def test_the_evaluation_shows_only_emoji_in_motions_that_training_never_showed(emoji: EmojiSet) -> None:
    maker = ClipMaker(emoji.emoji, seed=3, held_out=True)
    for _ in range(50):
        clip = maker.clip()
        assert is_held_out(("motion", emoji.emoji[clip.scene.things[0].emoji].name, clip.motion))


def test_the_clips_depend_on_the_seed_alone(emoji: EmojiSet) -> None:
    one, same, other = (make_clip_table(emoji.emoji, 200, seed) for seed in (1, 1, 2))
    assert one.captions == same.captions != other.captions
    assert np.array_equal(one.things, same.things)


# ------------------------------------------------------------------ the passes for training


def _liven(*modules: torch.nn.Module) -> None:
    """Fills what starts at zero: it could hide a fault."""
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def test_the_autoencoder_in_one_go_gives_what_diffusers_gives_chunk_by_chunk() -> None:
    torch.manual_seed(0)
    vae = build_vae(TRIAL_WIDTHS).eval()
    clips = torch.randn(2, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = vae.encode(clips).latent_dist
    mean, log_variance = encode_clips(vae, clips)
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_variance, expected.logvar, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decode_latents(vae, mean).clamp(-1, 1), vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_short_captions_give_what_the_pipeline_gives_for_padded_prompts() -> None:
    captions = ["a flag moving left", ""]
    tokenizer = build_tokenizer(captions * 20, 300)
    text_encoder = build_text_encoder(TRIAL_WIDTHS, len(tokenizer)).eval()
    transformer = build_transformer(TRIAL_WIDTHS).eval()
    _liven(text_encoder, transformer)
    pipeline = _PromptEncoder(tokenizer, text_encoder)
    latents = torch.randn(2, CHANNELS, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.3, 0.9])
    expected = transformer(latents, sigma * 1000, pipeline.embed(captions), return_dict=False)[0]
    ids, lengths = tokenize(tokenizer, captions)
    found = ClipDenoiser(transformer, text_encoder)(latents, sigma, ids.long(), lengths.long())
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_an_untrained_transformer_looks_at_the_words_and_not_at_the_padding() -> None:
    torch.manual_seed(0)
    captions = ["a flag moving left on the grass"]
    tokenizer = build_tokenizer(captions * 20, 300)
    widths = Widths(layers=2)
    text_encoder, transformer = build_text_encoder(widths, len(tokenizer)), build_transformer(widths)
    words = transformer.condition_embedder.text_embedder(_PromptEncoder(tokenizer, text_encoder).embed(captions))
    count = int(tokenize(tokenizer, captions)[1])
    for block in transformer.blocks:
        cross = block.attn2
        query, key = cross.norm_q(cross.to_q(torch.randn(1, 50, widths.dim))), cross.norm_k(cross.to_k(words))
        query, key = (part.unflatten(2, (cross.heads, -1)).transpose(1, 2) for part in (query, key))
        attention = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        assert attention.shape[-1] == PROMPT_TOKENS
        assert attention[..., :count].sum(-1).mean() > 0.6


def test_half_of_training_sees_noise_in_which_only_the_words_say_what_is_shown() -> None:
    torch.manual_seed(0)
    clips, stills = (train_video.draw_levels(20_000, frames, CPU) for frames in (5, 1))
    assert (clips > 0.95).float().mean() > 0.1
    assert (clips < 0.6).float().mean() > 0.15
    assert stills.mean() < clips.mean()


class _PromptEncoder:
    """WanPipeline's own way from a prompt to what its transformer gets."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        vae = build_vae(TRIAL_WIDTHS)
        self._pipeline = WanPipeline(tokenizer, text_encoder, vae, scheduler=None, transformer=None)

    def embed(self, prompts: list[str]) -> torch.Tensor:
        embeds, _ = self._pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS, device=CPU
        )
        return torch.as_tensor(embeds)


# ------------------------------------------------------------------ the checker


def test_the_checker_knows_motion_emoji_and_colour_of_real_clips(emoji: EmojiSet) -> None:
    drawer = Drawer(emoji.pictures, CPU, 48)
    checker = ClipChecker(Drawer(emoji.pictures, CPU, COMPARED_SIZE), Checker(drawer, len(emoji)), FRAMES)
    maker = ClipMaker(emoji.emoji, seed=11)
    asked = [clip for clip in (maker.clip() for _ in range(60)) if len(clip.scene.things) == 1]
    asked = [clip for clip in asked if checker.is_telling(clip)][:30]
    table = tabulate_clips(asked)
    arrays = (torch.from_numpy(array) for array in (table.things, table.backgrounds, table.motions))
    clips = ClipDrawer(drawer, FRAMES).draw(*arrays)
    noise = 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
    figures = add_up(mark(checker, asked, iter((clips + noise).clamp(-1, 1))))
    assert figures["motion right"] == 1
    assert figures["object right"] >= 0.95


def test_the_checker_says_so_when_a_clip_shows_something_else(emoji: EmojiSet) -> None:
    drawer = Drawer(emoji.pictures, CPU, 48)
    checker = ClipChecker(Drawer(emoji.pictures, CPU, COMPARED_SIZE), Checker(drawer, len(emoji)), FRAMES)
    scene = Scene("one", "", (Thing(2, 0, 0, MOTIONS["left"].scale),), plain_background())
    verdict = checker.judge(_draw(emoji, "right", 48), Clip(scene, "left"))
    assert (verdict.motion, verdict.emoji) == ("right", 0)


def test_the_evaluation_asks_for_as_many_clips_of_every_motion(emoji: EmojiSet) -> None:
    many = EmojiSet(
        tuple(replace(emoji.emoji[k % 4], name=f"{emoji.emoji[k % 4].name} {k}") for k in range(80)),
        np.stack([emoji.pictures[k % 4] for k in range(80)]),
    )
    drawer = Drawer(many.pictures, CPU, COMPARED_SIZE)
    checker = ClipChecker(drawer, Checker(drawer, 1), FRAMES)
    asked = choose_clips(many, checker, 1)
    assert [clip.motion for clip in asked] == list(MOTION_NAMES)
    assert all(checker.is_telling(clip) for clip in asked)


# ------------------------------------------------------------------ training


def _train(data: Path, work: Path, *more: str) -> dict[str, float]:
    flags = "--trial --size 48 --pool 64 --pool-seconds 1 --vae-batch 2 --batch 4 --stills-batch 8 --no-samples"
    flags += " --reserve-seconds 0 --vae-seconds 0.3 --seconds 0.3 --command-seconds 120"
    train_video.main(["--data", str(data), "--work", str(work), *flags.split(), *more])
    state: dict[str, float] = json.loads((work / "denoiser-training" / "state.json").read_text())
    return state


def test_a_training_writes_a_folder_that_the_stock_pipeline_loads_and_the_next_command_goes_on(
    data: Path, tmp_path: Path
) -> None:
    first = _train(data, tmp_path)
    assert first["progress"] == 1 and first["steps"] > 10
    pipeline = WanPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(height=SIDE, width=SIDE, num_frames=FRAMES, num_inference_steps=2, output_type="np")
    frames = pipeline("a flag moving left", **options).frames
    assert frames.shape == (1, FRAMES, SIDE, SIDE, 3) and np.isfinite(frames).all()
    statistics = pipeline.vae.config.latents_std
    assert not pipeline.vae.decoder.conv_in.weight[:, :, :-1].any(), "the autoencoder looks at earlier frames"

    state = tmp_path / "denoiser-training" / "state.json"
    state.write_text(json.dumps(first | {"progress": 0.5}))
    second = _train(data, tmp_path, "--seed", "1")
    assert second["progress"] == 1 and second["steps"] > first["steps"]
    config = json.loads((tmp_path / "model" / "vae" / "config.json").read_text())
    assert config["latents_std"] == pytest.approx(statistics)


def test_finishing_changes_the_decoder_alone_by_half_of_what_it_learned(data: Path, tmp_path: Path) -> None:
    _train(data, tmp_path)
    flags = f"--size {SIDE} --clips 12 --batch 2 --seconds 0.5 --no-samples"
    paths = {"--data": data, "--model": tmp_path / "model", "--work": tmp_path / "finish"}
    finish_video.main([*(str(part) for pair in paths.items() for part in pair), *flags.split()])
    before, after = (
        {part: load_file(folder / part / file) for part, file in WEIGHTS.items()}
        for folder in (tmp_path / "model", tmp_path / "finish" / "model")
    )
    written = [file.read_text() for file in (tmp_path / "finish" / "model").glob("*/*.json")]
    assert not [text for text in written if str(tmp_path) in text], "it tells where it was made"
    tokenizer = json.loads((tmp_path / "finish" / "model" / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizer["truncation"] is None, "the training's shorter captions stayed"
    learned = load_file(tmp_path / "finish" / "decoder-training" / "best.safetensors")
    for part, tensors in before.items():
        for name, old in tensors.items():
            new = after[part][name].float()
            best = learned.get(f"decoder.{name.removeprefix('decoder.')}") if name.startswith("decoder.") else None
            if best is None:
                assert torch.equal(new, old.float()), name
            else:
                torch.testing.assert_close(new, (old.float() + best) / 2, rtol=2e-3, atol=1e-3)
    assert any(not torch.equal(after["vae"][name], old) for name, old in before["vae"].items())


def test_an_animation_shows_every_clip_frame_by_frame(tmp_path: Path) -> None:
    clips = torch.zeros(3, 3, 4, 8, 8)
    for frame in range(4):
        clips[2, 0, frame] = frame / 3  # the third clip turns red
    write_animation(clips, tmp_path / "clips.webp", columns=2)
    with Image.open(tmp_path / "clips.webp") as animation:
        assert animation.size == (18, 18) and getattr(animation, "n_frames", 1) == 4
        reds = []
        for frame in range(4):
            animation.seek(frame)
            reds.append(animation.convert("RGB").getpixel((4, 14))[0])
    assert reds == sorted(reds) and reds[0] < 40 and reds[-1] > 200
