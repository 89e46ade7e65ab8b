"""Tokenizers learned from the captions: what both models share, the image model's, and its captions as token rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

CAPTION_TOKENS = 32
"""Tokens of a caption, its start and end marks included: what Z-Image pads captions to."""
PADDING, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = f"{{% for m in messages %}}{START}{{{{ m['content'] | trim }}}}{END}{{% endfor %}}"


def byte_pairs(captions: Iterable[str], vocabulary: int, special: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of these captions, blind to case and accents; ``special`` tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=list(special),
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def make_tokenizer(captions: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """The image model's, with the template that Z-Image needs."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(captions, vocabulary, (PADDING, START, END)),
        pad_token=PADDING,
        eos_token=END,
        padding_side="right",
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token rows int16 [n, 32], padded with 0, and their lengths int16 [n]; longer captions are cut."""
    marked = [f"{START}{caption}{END}" for caption in captions]
    found = tokenizer(marked, truncation=True, max_length=CAPTION_TOKENS)["input_ids"]
    rows = torch.zeros(len(found), CAPTION_TOKENS, dtype=torch.int16)
    for row, tokens in zip(rows, found, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
    return rows, torch.tensor([len(tokens) for tokens in found], dtype=torch.int16)
