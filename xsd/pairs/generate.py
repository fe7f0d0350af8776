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


def worth_leaving(num_finished: int, num_rows: int) -> bool:
    """Whether finished rows should leave now: moving a cache costs as much as a step."""
    return 4 * num_finished >= num_rows


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: Sequence[Float[Tensor, "_P D"]], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to a batch of embedded prompts; finished rows leave the batch in time."""
    cache, states = prefill(decoder, prompts, max_new_tokens)
    state = states[:, -1]
    ids: list[list[Tensor]] = [[] for _ in prompts]
    hidden: list[list[Tensor]] = [[] for _ in prompts]
    eos = torch.tensor(sorted(decoder.eos_ids), device=state.device)
    active = list(range(len(prompts)))
    done = torch.zeros(len(prompts), dtype=torch.bool, device=state.device)
    for position in range(max_new_tokens):
        tokens = decoder.logits(state).argmax(-1)
        for row, is_done in enumerate(done.tolist()):
            if not is_done:
                ids[active[row]].append(tokens[row])
                hidden[active[row]].append(state[row])
        done |= torch.isin(tokens, eos)
        if position + 1 == max_new_tokens or bool(done.all()):
            break
        if worth_leaving(int(done.sum()), len(active)):
            rows = (~done).nonzero()[:, 0]
            cache, tokens, done = cache.keep_rows(rows), tokens[rows], done[rows]
            active = [active[row] for row in rows.tolist()]
        state = decoder.forward(decoder.embed(tokens[:, None]), cache)[:, -1]
    return [
        Answer(torch.stack(ids[sample]), torch.stack(hidden[sample]))
        for sample in range(len(prompts))
    ]


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
