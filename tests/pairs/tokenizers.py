"""A tokenizer for tests that treats spaces as Llama's does and knows every printable character."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast


def llama_like(*special: str) -> PreTrainedTokenizerFast:
    """One id a character; a word-start mark leads every stretch of text, as in Llama's files."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "\n", *string.printable[:94], *special]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
