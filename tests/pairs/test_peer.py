from __future__ import annotations

import numpy as np
import pytest

from tests.hidden import miniature
from xsd.errors import XsdError
from xsd.pairs.base import Media
from xsd.pairs.generate import generate
from xsd.pairs.peer import Peer
from xsd.scenes.questions import QUESTIONS

MAX_NEW = 12


def test_the_peer_says_what_we_say() -> None:
    verifier = miniature.pair().verifier
    peer = Peer(verifier)
    random = np.random.default_rng(0)
    for question in QUESTIONS[:3]:
        frames = random.integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
        media = Media([], frames)
        (ours,) = generate(verifier, [verifier.prompt_embeddings(media, question)[0]], MAX_NEW)
        theirs = peer.answer(verifier.pixels(media), question, MAX_NEW)
        assert theirs == ours.ids.tolist()


def test_a_model_that_is_no_video_model_is_refused() -> None:
    with pytest.raises(XsdError, match="no video model"):
        Peer(miniature.pair().drafter)
