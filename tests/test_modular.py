"""The modular adapter and what it is made of: components, edges, pixels, and its errors."""

from __future__ import annotations

import gc
import io
import json
import logging
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import msgspec
import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
from picture_samples import picture
from PIL import Image

from ditrelay.errors import CodecError, ConfigError, InvalidRequest, UnsupportedModel
from ditrelay.models.blocks import crossing, split_stages
from ditrelay.models.card import load_card
from ditrelay.models.components import compile_blocks, set_attention
from ditrelay.models.folder import find_folder
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import PRELOAD, load_adapter, preload, resolve_dtype
from ditrelay.models.modular import ModularAdapter
from ditrelay.models.quirks import ATTENTION_BACKENDS, BUILTINS, family_named
from ditrelay.models.timed import TimedSession
from ditrelay.models.values import pack, unpack
from ditrelay.runtime.payloads import StateValue
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED, DIT, ENCODE

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="module")
def emoji() -> Any:
    return load_adapter(LoadSpec(card=load_card("builtin:emoji"), roles=COLOCATED))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_folder("builtin:emoji"), tmp_path / "model"))


def _request(model: str = "builtin:emoji", **params: Any) -> Request:
    return Request(request_id="r", params=load_card(model).resolve(SamplingParams(prompt="a red apple", **params)))


def _draw(adapter: Any, request: Request) -> np.ndarray[Any, Any]:
    session = adapter.begin([request], adapter.encode([request]))
    while adapter.step(session):
        pass
    return adapter.decode([request], adapter.finish(session))[0]


# ---------------------------------------------------------------- the built-in model


def test_the_built_in_model_draws_what_the_stock_pipeline_draws(emoji: Any) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(load_card("builtin:emoji").path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for params in ({"seed": 1}, {"seed": 2**63 - 1, "negative_prompt": "blue", "guidance_scale": 0.5, "height": 64}):
        request = _request(num_inference_steps=3, **params)
        stock = pipeline(
            request.params.prompt,
            negative_prompt=request.params.negative_prompt,
            height=request.params.height,
            width=request.params.width,
            num_inference_steps=3,
            guidance_scale=request.params.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.params.seed or 0),
        ).images[0]
        assert np.abs(_draw(emoji, request)[0].astype(int) - np.asarray(stock).astype(int)).max() <= 1


def test_the_built_in_models_shorter_padding_changes_no_bit_of_a_prompt(emoji: Any) -> None:
    card = load_card("builtin:emoji")
    assert card.text_tokens == 128
    padded = load_adapter(LoadSpec(card=msgspec.structs.replace(card, text_tokens=None), roles=COLOCATED))
    for params in ({}, {"prompt": "a kite and a boat " * 6, "negative_prompt": "blue"}):
        request = Request(
            request_id="r", params=card.resolve(SamplingParams(**{"prompt": "a red apple", "seed": 1, **params}))
        )
        short, long = emoji.encode([request]), padded.encode([request])
        assert short.keys() == long.keys()
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            for one, other in zip(short[name].value, long[name].value, strict=True):
                assert torch.equal(one, other)


def test_bfloat16_draws_nearly_the_same_picture(emoji: Any) -> None:
    spec = LoadSpec(card=load_card("builtin:emoji"), roles=COLOCATED, dtype="bfloat16")
    request = _request(seed=1, num_inference_steps=3)
    difference = _draw(load_adapter(spec), request).astype(int) - _draw(emoji, request).astype(int)
    assert 0 < np.abs(difference).mean() < 3


def test_weights_stored_as_float16_are_loaded_in_the_dtype_asked_for(emoji: Any) -> None:
    modules = [part for pipeline in emoji._pipelines.values() for part in vars(pipeline).values()]
    held = [p for part in modules if isinstance(part, torch.nn.Module) for p in part.parameters() if not p.is_meta]
    assert len(held) > 100
    assert {p.dtype for p in held} == {torch.float32} and not any(p.requires_grad for p in held)


def test_nothing_is_printed_while_loading_and_drawing(capfd: pytest.CaptureFixture[str]) -> None:
    adapter = load_adapter(LoadSpec(card=load_card("builtin:emoji"), roles=COLOCATED))
    _draw(adapter, _request(seed=1, num_inference_steps=2))
    assert capfd.readouterr() == ("", "")


def test_an_abandoned_request_leaves_no_tensor_behind(emoji: Any) -> None:
    request = _request(seed=1)
    session = emoji.begin([request], emoji.encode([request]))
    emoji.step(session)
    tensors = [value for value in session.state.values.values() if isinstance(value, torch.Tensor)]
    kept = [weakref.ref(tensor) for tensor in tensors]
    assert len(kept) >= 2
    del tensors
    emoji.abandon(session)
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_an_error_in_a_step_leaves_other_sessions_alone(emoji: Any) -> None:
    request = _request(seed=1, num_inference_steps=2)
    right = _draw(emoji, request)
    sessions = [emoji.begin([request], emoji.encode([request])) for _ in range(2)]
    with (
        mock.patch.object(type(emoji._pipelines["denoise"].transformer), "forward", side_effect=MemoryError("full")),
        pytest.raises(MemoryError),
    ):
        emoji.step(sessions[0])
    while emoji.step(sessions[1]):
        pass
    assert np.array_equal(emoji.decode([request], emoji.finish(sessions[1]))[0], right)


def test_batches_and_foreign_sessions_are_refused(emoji: Any) -> None:
    request = _request()
    with pytest.raises(ValueError, match="a batch of one"):
        emoji.encode([request, request])
    with pytest.raises(TypeError, match="a ModularSession is needed"):
        emoji.step(TimedSession(request.params, digest=0, total_steps=1, spent=0.0))
    session = emoji.begin([request], emoji.encode([request]))
    with pytest.raises(ValueError, match="steps remain"):
        emoji.finish(session)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("family", "conditioning", "latents"),
    [
        ("z-image", {"prompt_embeds", "negative_prompt_embeds"}, {"latents"}),
        ("flux", {"prompt_embeds", "pooled_prompt_embeds"}, {"latents"}),
        ("ltx", {"prompt_attention_mask"}, {"latents", "dtype", "batch_size"}),
        ("wan-i2v", {"image_embeds", "image_condition_latents"}, {"latents"}),
    ],
)
def test_edges_carry_what_the_next_stages_blocks_take(family: str, conditioning: set[str], latents: set[str]) -> None:
    stages = split_stages(family_named(family))
    to_dit = crossing([stages["encode"]], [stages["denoise"], stages["decode"]])
    to_decoder = crossing([stages["encode"], stages["denoise"]], [stages["decode"]])
    assert conditioning <= to_dit and to_decoder == latents
    assert "resized_image" not in to_dit  # a PIL image that only the encoders use


@pytest.mark.parametrize(
    "value", [torch.bfloat16, torch.ones(2), [torch.ones(1), torch.zeros(0)], 3, 1.5, "x", None, [1, [2]], {"a": 1}]
)
def test_values_survive_an_edge(value: Any) -> None:
    assert str(unpack(pack("v", value), CPU)) == str(value)


@pytest.mark.parametrize("value", [object(), [torch.ones(1), 2], float("nan"), {1: 2}, Image.new("RGB", (1, 1))])
def test_a_value_that_no_edge_carries_is_an_error_that_names_it(value: Any) -> None:
    with pytest.raises(CodecError, match="odd_one: "):
        pack("odd_one", value)


def test_the_kwargs_type_of_a_value_travels_with_it(emoji: Any) -> None:
    assert emoji.encode([_request()])["prompt_embeds"].kwargs_type == "denoiser_input_fields"


# ---------------------------------------------------------------- families' own traps


@pytest.mark.parametrize(("family", "argument"), [("wan", "timestep"), ("ltx", "timestep"), ("z-image", "t")])
def test_the_transformer_gets_the_exact_timestep_in_bfloat16(family: str, argument: str, tiny_root: Path) -> None:
    model = str(tiny_models.build(family, tiny_root))
    adapter: Any = load_adapter(LoadSpec(card=load_card(model), roles=COLOCATED, dtype="bfloat16"))
    seen: list[float] = []
    adapter._pipelines["denoise"].transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[argument].item()), with_kwargs=True
    )
    request = _request(model, height=32, width=32, num_frames=1, num_inference_steps=5)
    session = adapter.begin([request], adapter.encode([request]))
    timesteps = session.state.values["timesteps"]
    exact = [step.item() for step in (timesteps if argument == "timestep" else (1000 - timesteps) / 1000)]
    while adapter.step(session):
        pass
    assert seen == [step for step in exact for _ in ("with", "without")]
    assert any(torch.tensor(step, dtype=torch.bfloat16).item() != step for step in exact)


def test_a_picture_of_another_shape_is_stretched_to_the_requests_size(tiny_root: Path) -> None:
    model = str(tiny_models.build("wan-i2v", tiny_root))
    adapter = load_adapter(LoadSpec(card=load_card(model), roles=COLOCATED))
    file = io.BytesIO()
    Image.new("L", (50, 20), 99).save(file, "JPEG")
    params = dict(height=32, width=48, num_frames=5, num_inference_steps=1)
    assert _draw(adapter, _request(model, image=file.getvalue(), **params)).shape == (5, 32, 48, 3)


def test_a_picture_whose_pixels_are_damaged_is_refused_by_the_encoder(tiny_root: Path) -> None:
    """Its file is whole, so that only decoding it shows that."""
    model = str(tiny_models.build("wan-i2v", tiny_root))
    adapter = load_adapter(LoadSpec(card=load_card(model), roles=COLOCATED))
    whole = picture(32, 32)
    damaged = whole[:60] + bytes(40) + whole[100:]
    with pytest.raises(InvalidRequest, match="image: it can't be read"):
        adapter.encode([_request(model, image=damaged, height=32, width=32, num_frames=5)])


def test_encoding_a_picture_beside_decoding_a_clip_changes_neither(tiny_root: Path) -> None:
    model = str(tiny_models.build("wan-i2v", tiny_root))
    adapter = load_adapter(LoadSpec(card=load_card(model), roles=COLOCATED))
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(file, "PNG")
    request = _request(model, image=file.getvalue(), height=32, width=32, num_frames=9, num_inference_steps=1, seed=1)
    conditioning = adapter.encode([request])
    session = adapter.begin([request], conditioning)
    adapter.step(session)
    latents = adapter.finish(session)
    right = adapter.decode([request], latents)[0]
    with ThreadPoolExecutor(2) as pool:
        both = [
            (pool.submit(adapter.encode, [request]), pool.submit(adapter.decode, [request], latents)) for _ in range(6)
        ]
        for encoded, decoded in both:
            assert np.array_equal(decoded.result(60)[0], right)
            for name, value in encoded.result(60).items():
                assert torch.equal(value.value, conditioning[name].value), name


def test_a_dtype_that_a_model_overflows_is_an_error_and_no_black_picture() -> None:
    adapter = load_adapter(LoadSpec(card=load_card("builtin:emoji"), roles=COLOCATED, dtype="float16"))
    with pytest.raises(ArithmeticError, match="left the range of --dtype"):
        _draw(adapter, _request(height=32, width=32, num_inference_steps=1, seed=1))


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("model", [f"builtin:{name}" for name in BUILTINS])
def test_what_is_preloaded_exists_and_says_nothing(model: str) -> None:
    names = preload(load_card(model))
    assert len(names) > len(PRELOAD)
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dtype_auto_depends_on_the_device() -> None:
    assert resolve_dtype("auto", "cpu") == "float32" and resolve_dtype("auto", "cuda:1") == "bfloat16"
    assert resolve_dtype("float16", "cpu") == "float16"
    with pytest.raises(ConfigError, match="--dtype: 'half' is not allowed; allowed: auto"):
        resolve_dtype("half", "cpu")


def _rewrite_weights(path: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def _reshape_one(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(3, 5)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize(("change", "message"), [(_drop_one, "lack 1 tensors"), (_reshape_one, "can't be loaded|lack")])
def test_weights_that_do_not_fit_are_refused_naming_the_folder(
    folder: Path, component: str, change: Any, message: str
) -> None:
    _rewrite_weights(next((folder / component).glob("*.safetensors")), change)
    with pytest.raises(UnsupportedModel, match=f"{component}.*({message})|({message}).*{component}"):
        load_adapter(LoadSpec(card=load_card(str(folder)), roles=COLOCATED))


def test_a_config_that_its_class_does_not_take_is_refused_naming_the_folder_on_every_rank(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_heads": 5}))
    for roles in (ENCODE, DIT):
        with pytest.raises(UnsupportedModel, match="transformer can't be loaded as ZImageTransformer2DModel"):
            load_adapter(LoadSpec(card=load_card(str(folder)), roles=roles))


def test_a_file_damaged_after_the_card_was_read_is_refused_naming_it(folder: Path) -> None:
    card = load_card(str(folder))
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnsupportedModel, match="diffusion_pytorch_model.safetensors is damaged"):
        load_adapter(LoadSpec(card=card, roles=DIT))
    load_adapter(LoadSpec(card=card, roles=ENCODE))


def test_loading_says_nothing_of_packages_that_are_not_needed(tiny_root: Path) -> None:
    """transformers warns where torchvision is missing, once for each process, while diffusers' blocks are imported."""
    code = "import sys; from ditrelay.models import card, load_spec, loading; made = card.load_card(sys.argv[1]); "
    code += "loading.load_adapter(load_spec.LoadSpec(card=made, roles=frozenset({'encode'})))"
    command = [sys.executable, "-c", code, str(tiny_models.build("flux", tiny_root))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "torchvision" not in done.stderr


def test_a_class_that_the_library_does_not_have_is_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | {"transformer": ["diffusers", "NoSuchModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="transformer is a diffusers.NoSuchModel, which the installed diffusers"):
        load_adapter(LoadSpec(card=load_card(str(folder)), roles=DIT))


def test_a_tokenizer_without_its_chat_template_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModel, match="tokenizer.*no chat template"):
        load_adapter(LoadSpec(card=load_card(str(folder)), roles=ENCODE))


def test_flash_attention_falls_back_with_a_warning(emoji: Any, caplog: pytest.LogCaptureFixture) -> None:
    transformer = emoji._pipelines["denoise"].transformer
    with caplog.at_level(logging.WARNING, logger="ditrelay"):
        set_attention(transformer, "fa", CPU)
    assert "--attention-backend fa is not available here" in caplog.text
    caplog.clear()
    set_attention(transformer, "torch_sdpa", CPU)
    set_attention(transformer, "auto", CPU)
    assert not caplog.records


def test_every_attention_backend_is_one_of_diffusers_own() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = {name.value for name in AttentionBackendName}
    assert {name for names in ATTENTION_BACKENDS.values() for name in names} <= known


def test_compilation_takes_the_repeated_blocks_where_there_are_any(emoji: Any, tiny_root: Path) -> None:
    with mock.patch.object(torch.nn.Module, "compile", autospec=True) as compiled:
        compile_blocks(emoji._pipelines["denoise"].transformer)
        assert {type(call.args[0]).__name__ for call in compiled.call_args_list} == {"ZImageTransformerBlock"}
        compiled.reset_mock()
        sd3: Any = load_adapter(LoadSpec(card=load_card(str(tiny_models.build("sd3", tiny_root))), roles=DIT))
        compile_blocks(sd3._pipelines["denoise"].transformer)
        assert [type(call.args[0]).__name__ for call in compiled.call_args_list] == ["SD3Transformer2DModel"]


def test_a_missing_input_names_what_is_missing(emoji: Any) -> None:
    assert isinstance(emoji, ModularAdapter)
    with pytest.raises(ValueError, match="prompt_embeds"):
        emoji.begin([_request()], {"unheard": StateValue(1)})
