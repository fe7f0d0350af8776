"""What the rest of the system relies on in a pair. Call it from the test of a new one.

Everything behind this room (extraction, adapters, the engine) was written against these
properties; a pair that has them works in every stage.
"""

from __future__ import annotations

import torch

from xsd.pairs.base import Decoder, Media, ModelPair
from xsd.pairs.generate import generate, teacher_force


def check_pair(pair: ModelPair, media: Media, question: str, tolerance: float = 1e-4) -> None:
    """Check both halves, and that they share a vocabulary.

    Args:
        media: ``pair.num_event_images`` event images and ``pair.num_frames`` frames.
        tolerance: largest difference of states, relative to the largest of them.

    Raises:
        AssertionError: what does not hold.
    """
    assert set(pair.provenance) == {"drafter", "verifier"}, "a digest for each half"
    assert pair.drafter.vocab_size == pair.verifier.vocab_size, "both choose among the same ids"
    for decoder in (pair.drafter, pair.verifier):
        check_decoder(decoder, media, question, tolerance)


@torch.inference_mode()
def check_decoder(decoder: Decoder, media: Media, question: str, tolerance: float) -> None:
    """Shapes, prompt, and that a cache changes no state: cut, rolled back, padded or batched."""
    prompt, other = decoder.prompt(question), decoder.prompt(f"{question} {question}")
    assert prompt.before == other.before, "the question comes after the visual tokens"
    assert prompt.after != other.after, "the question is in the prompt"
    visual = decoder.visual_tokens(decoder.pixels(media))
    assert visual.shape[1] == decoder.width, "visual tokens are as wide as the states"
    row = decoder.embed_prompt(prompt, visual)[0]
    assert len(row) == len(prompt.before) + len(visual) + len(prompt.after), "a row a token"

    def close(one: torch.Tensor, two: torch.Tensor, what: str) -> None:
        off = float((one.float() - two.float()).abs().max() / two.float().abs().max())
        assert off <= tolerance, f"{what}: off by {off:.1e}"

    def run(*parts: torch.Tensor) -> torch.Tensor:
        cache = decoder.new_cache(1, sum(len(part) for part in parts))
        return torch.cat([decoder.forward(part[None], cache)[0] for part in parts])

    states = run(row)
    close(run(row[:-4], row[-4:-3], row[-3:]), states, "a prompt in several passes")
    cache = decoder.new_cache(1, len(row) + 8)
    decoder.forward(row[None, :-2], cache)
    decoder.forward(row[None, :5], cache)
    cache.length = len(row) - 2
    close(decoder.forward(row[None, -2:], cache)[0], states[-2:], "rows after a rollback")

    logits = decoder.logits(states[-1:])
    assert logits.shape == (1, decoder.vocab_size), "a logit for each shared id"
    rows = [row, decoder.embed_prompt(other, visual)[0]]
    together, alone = (
        [answer for batch in batches for answer in generate(decoder, batch, 4)]
        for batches in ([rows], [[one] for one in rows])
    )
    for a, b in zip(together, alone, strict=True):
        assert a.ids.tolist() == b.ids.tolist(), "an answer does not depend on its batch"
        close(a.hidden, b.hidden, "states of a padded batch")
    forced = teacher_force(decoder, rows, [answer.ids for answer in alone])
    for state, answer in zip(forced, alone, strict=True):
        close(state, answer.hidden, "states while being fed the answer")
