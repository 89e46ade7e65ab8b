"""Model cards: what is refused before anything starts, which defaults are filled in, which requests are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny_models
from picture_samples import picture

from ditrelay.errors import InvalidRequest, UnsupportedModel
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.folder import ModelFolder, find_folder
from ditrelay.models.quirks import BUILTINS
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.server_args import server_flags

PNG = picture(32, 32)


@pytest.fixture(scope="module")
def emoji() -> ModelCard:
    return load_card("builtin:emoji")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the built-in model that a test may damage."""
    return Path(shutil.copytree(find_folder("builtin:emoji"), tmp_path / "model"))


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


def test_the_head_reads_cards_without_torch() -> None:
    code = "import sys; from ditrelay.models.card import load_card; load_card('builtin:emoji')"
    code += "; sys.exit(bool({'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_built_in_model_has_its_own_defaults(emoji: ModelCard) -> None:
    params = emoji.resolve(SamplingParams(prompt="a red apple"))
    assert (params.height, params.width, params.num_inference_steps, params.guidance_scale) == (128, 128, 8, 2.0)
    assert params.num_frames == 1
    assert emoji.family == "z-image" and emoji.media == "image" and emoji.adapter == "modular"


def test_a_card_survives_the_wire(emoji: ModelCard) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(emoji), type=ModelCard) == emoji


def test_a_seed_is_drawn_where_none_is_given_and_kept_where_one_is(emoji: ModelCard) -> None:
    drawn = {emoji.resolve(SamplingParams(prompt="x")).seed for _ in range(8)}
    assert len(drawn) > 1 and all(seed is not None and 0 <= seed < 2**31 for seed in drawn)
    assert emoji.resolve(SamplingParams(prompt="x", seed=2**63 - 1)).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("param", "given", "allowed"),
    [
        ("prompt", {"prompt": "  \n"}, "empty"),
        ("prompt", {"prompt": "x" * 5000}, "at most 4096"),
        ("negative_prompt", {"negative_prompt": "x" * 5000}, "at most 4096"),
        ("height", {"height": 100}, "a positive multiple of 16"),
        ("height", {"height": 0}, "a positive multiple of 16"),
        ("height", {"height": True}, "a positive multiple of 16"),
        ("width", {"width": -16}, "a positive multiple of 16"),
        ("width", {"width": 1040}, "at most 1024"),
        ("height", {"height": 1024, "width": 1024}, "at most 262144 pixels"),
        ("output_format", {"output_format": "gif"}, "allowed: png, jpeg, webp"),
        ("output_compression", {"output_format": "webp", "output_compression": 101}, "0 to 100"),
        ("output_compression", {"output_format": "jpeg", "output_compression": True}, "0 to 100"),
        ("output_compression", {"output_compression": 99}, "with png, which loses nothing; allowed: 100"),
        ("num_inference_steps", {"num_inference_steps": 0}, "1 to 1000"),
        ("num_inference_steps", {"num_inference_steps": 1001}, "1 to 1000"),
        ("num_inference_steps", {"num_inference_steps": True}, "1 to 1000"),
        ("prompt", {"prompt": 5}, "a int is not allowed"),
        ("prompt", {"prompt": "a cat \udcff"}, "not UTF-8, or half a surrogate pair"),
        ("negative_prompt", {"negative_prompt": "\ud800"}, "not UTF-8, or half a surrogate pair"),
        ("guidance_scale", {"guidance_scale": float("nan")}, "0 to 1000"),
        ("guidance_scale", {"guidance_scale": float("inf")}, "0 to 1000"),
        ("guidance_scale", {"guidance_scale": 1e300}, "0 to 1000"),
        ("guidance_scale", {"guidance_scale": 10**400}, "0 to 1000"),
        ("guidance_scale", {"guidance_scale": "2"}, "0 to 1000"),
        ("guidance_scale", {"guidance_scale": -1.0}, "0 to 1000"),
        ("seed", {"seed": -1}, "0 to 9223372036854775807"),
        ("seed", {"seed": 2**63}, "0 to 9223372036854775807"),
        ("num_frames", {"num_frames": 2}, "allowed: 1"),
        ("image", {"image": b"x"}, "allowed: a PNG, JPEG, WebP, AVIF or GIF picture"),
        ("image", {"image": "apple.png"}, "a str is not allowed; allowed: the bytes of a PNG"),
        ("strength", {"strength": 0.5}, "there is none; leave it out"),
        ("strength", {"image": PNG, "strength": 0.0}, "above 0, and at most 1"),
        ("strength", {"image": PNG, "strength": 1.5}, "above 0, and at most 1"),
        ("strength", {"image": PNG, "strength": float("nan")}, "above 0, and at most 1"),
        ("strength", {"image": PNG, "strength": True}, "above 0, and at most 1"),
        ("strength", {"image": PNG, "strength": 1e-30}, "no step of 8"),
        ("negative_prompt", {"negative_prompt": "blurry", "guidance_scale": 0.0}, "allowed: above 0.0"),
    ],
)
def test_a_wrong_request_is_refused_naming_the_field_and_what_is_allowed(
    emoji: ModelCard, param: str, given: dict[str, object], allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        emoji.resolve(msgspec.structs.replace(SamplingParams(prompt="a cat"), **given))
    assert caught.value.param == param
    assert allowed in caught.value.reason


class _Word(str):
    pass


def test_numpys_numbers_and_other_kinds_of_text_become_pythons_which_a_message_can_hold(emoji: ModelCard) -> None:
    numbers = {
        "seed": np.int64(3),
        "guidance_scale": np.float64(2.5),
        "strength": np.float32(0.5),
        "height": np.int32(64),
    }
    texts = {"prompt": _Word("a cat"), "output_format": _Word("jpeg")}
    odd = SamplingParams(**texts | numbers, image=bytearray(PNG))  # type: ignore[arg-type]
    resolved = emoji.resolve(odd)
    plain = emoji.resolve(
        SamplingParams(
            prompt="a cat", image=PNG, output_format="jpeg", seed=3, guidance_scale=2.5, strength=0.5, height=64
        )
    )
    assert msgspec.msgpack.encode(resolved) == msgspec.msgpack.encode(plain)


@pytest.mark.parametrize(("family", "fewest"), [("qwen-image", 2), ("ltx", 2), ("flux", 1), ("wan", 1)])
def test_a_schedule_that_is_stretched_to_its_end_has_two_steps_at_least(
    tiny_root: Path, family: str, fewest: int
) -> None:
    card = load_card(str(tiny_models.build(family, tiny_root)))
    card.resolve(SamplingParams(prompt="a cat", num_inference_steps=fewest))
    with pytest.raises(InvalidRequest, match=f"num_inference_steps: .*allowed: {fewest} to 1000"):
        card.resolve(SamplingParams(prompt="a cat", num_inference_steps=fewest - 1))


@pytest.mark.parametrize(
    ("sides", "given", "expected"),
    [
        ((100, 60), {}, (96, 64)),
        ((1000, 500), {}, (176, 96)),
        ((4, 3000), {}, (16, 1024)),
        ((1000, 500), {"width": 256}, (256, 128)),
        ((1000, 500), {"height": 64}, (128, 64)),
        ((1000, 500), {"height": 64, "width": 64}, (64, 64)),
    ],
)
def test_an_edit_keeps_the_pictures_size_or_its_proportions(
    emoji: ModelCard, sides: tuple[int, int], given: dict[str, int], expected: tuple[int, int]
) -> None:
    params = emoji.resolve(SamplingParams(prompt="x", image=picture(*sides), **given))
    assert (params.width, params.height) == expected
    assert params.strength == emoji.default_strength == 0.5


@pytest.mark.parametrize(
    ("sides", "given", "expected"),
    [
        ((832, 480), {}, (832, 480)),
        ((480, 832), {}, (480, 832)),
        ((50, 50), {}, (624, 624)),
        ((3000, 1000), {}, (1088, 368)),
        ((480, 832), {"width": 240}, (240, 416)),
        ((480, 832), {"width": 64, "height": 32}, (64, 32)),
    ],
)
def test_a_clip_has_the_proportions_of_its_picture_and_as_many_pixels_as_the_default(
    tiny_root: Path, sides: tuple[int, int], given: dict[str, int], expected: tuple[int, int]
) -> None:
    card = load_card(str(tiny_models.build("wan-i2v", tiny_root)))
    card = msgspec.structs.replace(card, default_width=832, default_height=480, max_side=8192, size_multiple=16)
    params = card.resolve(SamplingParams(prompt="x", image=picture(*sides), **given))
    assert (params.width, params.height) == expected


@pytest.mark.parametrize(
    ("limits", "sides", "expected"),
    [
        ({"max_side": 1024}, (2400, 1200), (1024, 512)),
        ({"max_side": 1024}, (1200, 2400), (512, 1024)),
        ({"max_side": 1024, "max_width": 512}, (2400, 1200), (512, 256)),
        ({"max_side": 1024, "max_height": 256}, (1200, 2400), (128, 256)),
        ({"max_side": 1000}, (2000, 1000), (992, 496)),
    ],
)
def test_where_a_side_would_be_too_long_both_are_made_smaller_and_nothing_is_squeezed(
    emoji: ModelCard, limits: dict[str, int], sides: tuple[int, int], expected: tuple[int, int]
) -> None:
    card = msgspec.structs.replace(emoji, default_width=4096, default_height=4096, max_pixels=1 << 30, **limits)
    params = card.resolve(SamplingParams(prompt="x", image=picture(*sides)))
    assert (params.width, params.height) == expected


@pytest.mark.parametrize(("given", "sides"), [({"height": 1024}, (200, 100)), ({"width": 1024}, (100, 200))])
def test_a_side_whose_other_side_would_be_too_long_is_refused_by_its_name(
    emoji: ModelCard, given: dict[str, int], sides: tuple[int, int]
) -> None:
    card = msgspec.structs.replace(emoji, max_side=1024, max_pixels=1 << 30)
    [name] = given
    with pytest.raises(InvalidRequest, match=f"{name}: .*other side has 2048 pixels; allowed: at most 1024"):
        card.resolve(SamplingParams(prompt="x", image=picture(*sides), **given))
    both = card.resolve(SamplingParams(prompt="x", image=picture(*sides), height=1024, width=1024))
    assert (both.width, both.height) == (1024, 1024)


def test_a_model_that_edits_no_pictures_refuses_one_and_a_strength() -> None:
    card = load_card("builtin:timed")
    with pytest.raises(InvalidRequest, match="image: this model takes no picture"):
        card.resolve(SamplingParams(prompt="x", image=PNG))
    with pytest.raises(InvalidRequest, match="strength: this model does not start from a picture by strength"):
        card.resolve(SamplingParams(prompt="x", strength=0.5))


def test_a_picture_is_a_png_file_unless_another_format_is_given(emoji: ModelCard) -> None:
    assert emoji.resolve(SamplingParams(prompt="x")).output_format == "png"
    params = SamplingParams(prompt="x", output_format="jpeg", output_compression=0)
    assert (emoji.resolve(params).output_format, emoji.resolve(params).output_compression) == ("jpeg", 0)


def test_a_side_that_webp_cannot_hold_is_refused(emoji: ModelCard) -> None:
    card = msgspec.structs.replace(emoji, max_side=1 << 15, max_pixels=1 << 30)
    params = SamplingParams(prompt="x", height=1 << 14, width=16)
    with pytest.raises(InvalidRequest, match="output_format: webp holds at most 16383"):
        card.resolve(msgspec.structs.replace(params, output_format="webp"))
    assert card.resolve(params).output_format == "png"


def test_a_video_model_takes_no_picture_format(tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build("wan", tiny_root)))
    params = SamplingParams(prompt="x", height=32, width=32, num_frames=5)
    assert card.resolve(params).output_format is None
    with pytest.raises(InvalidRequest, match="output_format: this model makes MP4 clips"):
        card.resolve(msgspec.structs.replace(params, output_format="png"))


def test_a_video_model_names_the_nearest_allowed_number_of_frames(tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build("wan", tiny_root)))
    with pytest.raises(InvalidRequest, match=r"num_frames.*4k \+ 1, the nearest is 9"):
        card.resolve(SamplingParams(prompt="x", height=32, width=32, num_frames=10))
    with pytest.raises(InvalidRequest, match="num_frames.*1 to 125"):
        card.resolve(SamplingParams(prompt="x", height=32, width=32, num_frames=500))
    assert card.resolve(SamplingParams(prompt="x", num_frames=9)).num_frames == 9


def test_an_image_to_video_model_asks_for_the_picture(tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build("wan-i2v", tiny_root)))
    with pytest.raises(InvalidRequest, match="image: .*PNG, JPEG, WebP, AVIF or GIF"):
        card.resolve(SamplingParams(prompt="x"))


def test_a_model_without_negative_prompt_refuses_one(tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build("flux", tiny_root)))
    with pytest.raises(InvalidRequest, match="negative_prompt: this model takes none"):
        card.resolve(SamplingParams(prompt="x", negative_prompt="y"))


def test_a_guidance_distilled_model_refuses_another_scale(folder: Path) -> None:
    card = msgspec.structs.replace(load_card(str(folder)), supports_guidance=False, default_guidance_scale=0.0)
    with pytest.raises(InvalidRequest, match="guidance_scale: .*this model has no guidance.*allowed: 0 to 1"):
        card.resolve(SamplingParams(prompt="x", guidance_scale=3.0))
    assert card.resolve(SamplingParams(prompt="x", guidance_scale=0.0)).guidance_scale == 0.0


@pytest.mark.parametrize(
    ("family", "multiple", "frame_multiple"),
    [("z-image", 16, 1), ("flux", 4, 1), ("sd3", 4, 1), ("wan", 16, 4), ("ltx", 32, 4), ("cogvideox", 16, 4)],
)
def test_size_rules_come_from_the_configs(tiny_root: Path, family: str, multiple: int, frame_multiple: int) -> None:
    card = load_card(str(tiny_models.build(family, tiny_root)))
    assert (card.size_multiple, card.frame_multiple) == (multiple, frame_multiple)
    assert card.default_height % multiple == 0 and card.default_height <= card.max_side
    assert (card.default_num_frames - 1) % frame_multiple == 0 and card.default_num_frames <= card.max_num_frames


# ---------------------------------------------------------------- folders that are refused


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _into_bin(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def _write_header(folder: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def _lose_shard(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    index = {"weight_map": {"x": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (folder / "transformer" / f"{weights.name}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: (f / "model_index.json").write_text("[1]"), "model_index.json is not a JSON object"),
        (lambda f: _edit_index(f, _class_name="Unheard"), "Unheard is not supported; supported: .*FluxPipeline"),
        (
            lambda f: _edit_index(f, _class_name="WanPipeline", boundary_ratio=0.9),
            "WanPipeline with boundary_ratio=0.9",
        ),
        (lambda f: _edit_index(f, vae=[None, None]), "names no vae"),
        (lambda f: _edit_index(f, vae=["my_code", "Vae"]), "vae is a my_code.Vae; code that comes with a model"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "component folder .*text_encoder is missing"),
        (lambda f: (f / "vae" / "config.json").unlink(), "vae/config.json is missing"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "vae/config.json is damaged"),
        (lambda f: (f / "vae" / "config.json").write_text("[" * 10**5), "vae/config.json is damaged"),
        (lambda f: (f / "vae" / "config.json").write_text('{"block_out_channels": null}'), "a value of a wrong kind"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer/tokenizer.json is damaged"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "tokenizer has no vocabulary; tokenizer.json, a"),
        (lambda f: (f / "tokenizer" / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler has no config"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("[]"), "scheduler_config.json is not a JSON"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "text_encoder has no weights"),
        (lambda f: _truncate(f / "text_encoder" / "model.safetensors"), "model.safetensors is damaged"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"junk"), "safetensors is damaged"),
        (_into_bin, "vae has no weights; .*safetensors"),
        (_lose_shard, "00001-of-00001.safetensors is missing"),
        (lambda f: (f / "vae/x.safetensors.index.json").write_text('{"weight_map": []}'), "it names no weight files"),
        (lambda f: _write_header(f, {"x": {"data_offsets": ["a", "b"]}}), "safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_naming_the_file(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    load_card(str(folder))
    damage(folder)
    with pytest.raises(UnsupportedModel, match=message):
        load_card(str(folder))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:unheard", "built in: emoji, emoji-video, timed"),
        ("./no/such/folder", "no folder './no/such/folder'; .* a hub id, builtin:emoji or builtin:emoji-video$"),
        ("nowhere", "there is no folder 'nowhere'"),
        ("~nobody-of-that-name/model", "the folder '~nobody-of-that-name/model' can't be read"),
        ("x" * 300, "can't be read: .*File name too long"),
    ],
)
def test_a_model_path_that_leads_nowhere_is_refused(path: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load_card(path)


def test_the_help_of_the_model_path_names_every_built_in_model() -> None:
    [flag] = [flag for flag in server_flags() if flag.name == "model_path"]
    assert [name for name in BUILTINS if f"builtin:{name} " not in flag.spec.help] == []


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    card = load_card("owner/model-1.0")
    assert card.name == "owner/model-1.0" and card.path == str(folder)
    assert asked["repo_id"] == "owner/model-1.0"
    assert not any(str(pattern).endswith((".bin", ".pt", ".py")) for pattern in asked["patterns"])  # type: ignore


def test_a_hub_that_does_not_answer_is_an_unsupported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repo_id: str, **_: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UnsupportedModel, match="'owner/model' is no folder here, and the hub.*no route to host"):
        load_card("owner/model")


def test_optional_components_left_empty_are_no_components(folder: Path) -> None:
    _edit_index(folder, image_encoder=[None, None])
    assert "image_encoder" not in ModelFolder(folder).components
    load_card(str(folder))
