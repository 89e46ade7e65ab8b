"""What the package declares suffices for what released models come with. The development tools add nothing to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import sentencepiece
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
WORDS = "a red apple on the table, a cat under it; green leaves and a blue sky over the old house by the river"
ASK = """
import sys
sys.path[:0] = [sys.argv[1]]
import transformers
for name in ("T5Tokenizer", "T5TokenizerFast"):
    print(getattr(transformers, name).from_pretrained(sys.argv[2], local_files_only=True)("a red apple").input_ids)
"""


def closure(lines: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions that these requirements bring along, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(line), frozenset[str]()) for line in lines]
    while waiting:
        wanted, extras = waiting.pop()
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        try:
            made = distribution(name)
        except PackageNotFoundError:
            continue  # another platform's
        if name not in found or wanted.extras:
            waiting += [(Requirement(line), frozenset(wanted.extras)) for line in made.requires or ()]
        found[name] = made
    return found


def link(distributions: Iterable[Distribution], site: Path) -> None:
    """A site-packages with these alone."""
    for each in distributions:
        home = Path(str(each.locate_file("")))
        tops = {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(home / top)


def test_what_is_declared_reads_a_t5_tokenizer_that_comes_as_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    text, folder, site = tmp_path / "text", tmp_path / "tokenizer", tmp_path / "site"
    folder.mkdir()
    site.mkdir()
    text.write_text("\n".join([WORDS] * 10))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    link(closure(declared).values(), site)
    command = [sys.executable, "-I", "-S", "-c", ASK, str(site), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    slow, fast = (json.loads(line) for line in done.stdout.splitlines())
    assert slow == fast and len(slow) > 1 and slow[-1] == 1
