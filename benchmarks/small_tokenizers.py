"""Tokenizers of a few hundred words, made in place: what runs with random weights needs tokens, not meaning."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

_CORPUS = [
    "a cat sitting on a red chair in the sun",
    "a small boat on the blue sea at night",
    "photo of a city street with rain and neon lights",
    "low quality, blurry, bad anatomy",
] * 3
_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
_QWEN_SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
_CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _bpe(size: int, special: list[str], suffix: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    options = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **options
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    vocab = tokenizer.get_vocab()
    for letter in alphabet:
        vocab.setdefault(letter + suffix, len(vocab))
    # a merge is known by its result; those of two parts that are both in the vocabulary are enough
    merges = [(word[:i], word[i:]) for word in vocab for i in range(1, len(word)) if not word.startswith("<|")]
    return vocab, [pair for pair in merges if pair[0] in vocab and pair[1] in vocab]


def clip_tokenizer() -> Any:
    vocab, merges = _bpe(600, ["<|startoftext|>", "<|endoftext|>"], "</w>")
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> Any:
    words = sorted({word.strip(",") for line in _CORPUS for word in line.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in words] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def qwen_tokenizer(chat: bool = False) -> Any:
    vocab, merges = _bpe(500, _QWEN_SPECIAL)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if chat:
        tokenizer.chat_template = _CHAT
    return tokenizer
