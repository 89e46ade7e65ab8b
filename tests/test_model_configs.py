"""Config-only folders of real size: the parameter counts are those of the released models. Nothing is allocated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import model_configs
import pytest
import transformers

from ditrelay.models.card import load_card
from ditrelay.models.dummy import skeleton
from ditrelay.models.folder import ModelFolder


@pytest.fixture(scope="module", params=model_configs.MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    name = request.param
    yield name, model_configs.write_folder(name, tmp_path_factory.mktemp("configs") / name)


def _class(folder: Path, component: str) -> Any:
    library, cls = ModelFolder(folder).components[component]
    return getattr(diffusers if library == "diffusers" else transformers, cls)


def test_every_component_has_the_number_of_parameters_of_the_released_model(made: tuple[str, Path]) -> None:
    name, folder = made
    for component, billions in model_configs.MODELS[name]().billions.items():
        model = skeleton(_class(folder, component), folder / component)
        assert all(parameter.is_meta for parameter in model.parameters())
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        assert count == pytest.approx(billions, rel=0.005), component


def test_a_folder_is_a_model_that_can_be_served_with_random_weights(made: tuple[str, Path]) -> None:
    name, folder = made
    card = load_card(str(folder), "dummy")
    assert name.startswith(card.family)
    assert card.media == ("video" if card.family == "wan" else "image") and card.size_multiple == 16


def test_token_ids_are_within_the_vocabulary_of_the_encoder(made: tuple[str, Path]) -> None:
    _, folder = made
    for component in ModelFolder(folder).components:
        if component.startswith("tokenizer"):
            tokenizer = _class(folder, component).from_pretrained(str(folder / component))
            encoder = component.replace("tokenizer", "text_encoder")
            config = _class(folder, encoder).config_class.from_pretrained(str(folder / encoder))
            ids = tokenizer("a cat, 2 words!", padding="max_length", max_length=77).input_ids
            assert len(ids) == 77 and max(ids) < len(tokenizer) <= config.vocab_size


def test_only_schnell_has_no_guidance(tmp_path: Path) -> None:
    cards = {
        name: load_card(str(model_configs.write_folder(name, tmp_path / name)), "dummy")
        for name in model_configs.MODELS
    }
    assert [name for name, card in cards.items() if not card.supports_guidance] == ["flux-schnell"]


def test_the_command_line_writes_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, model_configs.__file__, "wan2.1-1.3b", str(tmp_path / "wan")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert load_card(str(tmp_path / "wan"), "dummy").family == "wan"
