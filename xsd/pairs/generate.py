"""Batched plain decoding: the only one, used by extraction, scoring and the tests alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xsd.pairs.base import Decoder
from xsd.pairs.cache import KVCache


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer: ``hidden[t]`` is the state that predicted ``ids[t]``; EOS included."""

    ids: Int[Tensor, " T"]
    hidden: Float[Tensor, "T D"]


def prefill(
    decoder: Decoder,
    prompts: Sequence[Float[Tensor, "_P D"]],
    num_new: int,
    cache: KVCache | None = None,
) -> tuple[KVCache, Float[Tensor, "B P D"]]:
    """Prefill a batch of prompts of any lengths, padded on the left.

    Returns the cache (None: a new one with room for ``num_new`` more positions), and the states
    of all rows.
    """
    longest = max(len(prompt) for prompt in prompts)
    pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=prompts[0].device)
    rows = torch.stack(
        [torch.nn.functional.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts]
    )
    if cache is None:
        cache = decoder.new_cache(len(prompts), longest + num_new)
    cache.pad = pad if bool(pad.any()) else None
    return cache, decoder.forward(rows, cache)


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: Sequence[Float[Tensor, "_P D"]], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to a batch of embedded prompts; finished rows leave the batch at once."""
    cache, states = prefill(decoder, prompts, max_new_tokens)
    state = states[:, -1]
    eos = torch.tensor(sorted(decoder.eos_ids), device=state.device)
    active = list(range(len(prompts)))
    said: list[tuple[list[int], Tensor, Tensor]] = []
    for position in range(max_new_tokens):
        tokens = decoder.logits(state).argmax(-1)
        said.append((active, tokens, state))
        if position + 1 == max_new_tokens:
            break
        is_done = torch.isin(tokens, eos).tolist()
        going = [row for row, done in enumerate(is_done) if not done]
        if not going:
            break
        if len(going) < len(active):
            going = cache.retire(going)
            active, tokens = [active[row] for row in going], tokens[going]
        state = decoder.forward(decoder.embed(tokens[:, None]), cache)[:, -1]
    return _by_answer(said, len(prompts))


def _by_answer(said: Sequence[tuple[list[int], Tensor, Tensor]], num_answers: int) -> list[Answer]:
    """Of every step: whose rows they were, tokens [rows], states [rows, D]."""
    whose = torch.tensor([answer for active, _, _ in said for answer in active])
    order = whose.argsort(stable=True)
    lengths = whose.bincount(minlength=num_answers).tolist()
    ids = torch.cat([tokens for _, tokens, _ in said])[order].split(lengths)
    hidden = torch.cat([states for _, _, states in said])[order].split(lengths)
    return [Answer(*pair) for pair in zip(ids, hidden, strict=True)]


@torch.inference_mode()
def teacher_force(
    decoder: Decoder,
    prompts: Sequence[Float[Tensor, "_P D"]],
    answers: Sequence[Int[Tensor, " _T"]],
) -> list[Float[Tensor, "_T D"]]:
    """States that ``decoder`` has while it is fed given answers, in one pass over the batch.

    ``result[i][t]`` is the state from which it would predict ``answers[i][t]``.
    """
    full = [
        torch.cat([prompt, decoder.embed(answer[None, :-1])[0]])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    _, states = prefill(decoder, full, 0)
    return [
        row[row.shape[0] - len(answer) :].clone()
        for row, answer in zip(states, answers, strict=True)
    ]
