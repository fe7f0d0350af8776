"""What the tiny pair can do, measured on clips of recordings that it never saw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn import functional

from xsd.decoding.controls import NGramTable, commonest_answers, ngram_tau, template_prefix
from xsd.learning.pretrain.config import PretrainConfig
from xsd.learning.pretrain.corpus import Corpus, clip_facts, normalise
from xsd.pairs.base import Decoder, ModelPair
from xsd.pairs.generate import generate, teacher_force
from xsd.scenes.facts import Facts
from xsd.scenes.language import House, answer, stated_facts
from xsd.scenes.questions import QUESTIONS

Images = UInt8[np.ndarray, "clips N H W 3"]


@dataclass(frozen=True)
class Report:
    """One model's figures."""

    num_answers: int
    facts_right: dict[str, float]
    """Attribute -> share of the reference's mentions that the answer states, in the same order."""
    sentences_right: float
    """Answers equal to the reference, word for word."""
    perplexity: float
    """Of the reference answers, a token."""
    mean_length: float
    """Tokens of an answer, EOS included."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Spoken:
    """The model's own answers, kept for the controls."""

    clip: int
    question_index: int
    ids: tuple[int, ...]


def examine(
    decoder: Decoder,
    images: Images,
    facts: Sequence[Facts],
    house: House,
    *,
    clips_per_batch: int = 8,
    max_new_tokens: int = 64,
) -> tuple[Report, list[Spoken]]:
    """Let a model answer all questions on all clips, and check what it says."""
    right: Counter[str] = Counter()
    named: Counter[str] = Counter()
    spoken: list[Spoken] = []
    exact, loss, tokens = 0, 0.0, 0
    for start in range(0, len(facts), clips_per_batch):
        batch = range(start, min(start + clips_per_batch, len(facts)))
        jobs = [(clip, question) for clip in batch for question in range(len(QUESTIONS))]
        visual = {
            clip: decoder.visual_tokens(normalise(torch.from_numpy(images[clip]))) for clip in batch
        }
        prompts = [
            decoder.embed_prompt(decoder.prompt(QUESTIONS[question]), visual[clip])[0]
            for clip, question in jobs
        ]
        references = [answer(facts[clip], question, house) for clip, question in jobs]
        for (clip, question), reference, said in zip(
            jobs, references, generate(decoder, prompts, max_new_tokens), strict=True
        ):
            ids = tuple(said.ids.tolist())
            spoken.append(Spoken(clip, question, ids))
            text = decoder.decode_text(ids)
            exact += text == reference
            stated = stated_facts(text, house)
            for attribute, values in stated_facts(reference, house).items():
                named[attribute] += len(values)
                said_values = stated.get(attribute, [])
                right[attribute] += sum(map(str.__eq__, said_values, values))
        batch_loss, batch_tokens = _loss(decoder, prompts, references)
        loss, tokens = loss + batch_loss, tokens + batch_tokens
    report = Report(
        num_answers=len(spoken),
        facts_right={name: right[name] / named[name] for name in sorted(named)},
        sentences_right=exact / len(spoken),
        perplexity=math.exp(loss / tokens),
        mean_length=sum(len(s.ids) for s in spoken) / len(spoken),
    )
    return report, spoken


def _loss(
    decoder: Decoder, prompts: list[torch.Tensor], references: list[str]
) -> tuple[float, int]:
    """Summed cross-entropy of the reference answers, and their number of tokens."""
    (eos,) = decoder.eos_ids
    answers = [
        torch.tensor(
            [*decoder.tokenizer.encode(text, add_special_tokens=False), eos],
            device=decoder.embedding.device,
        )
        for text in references
    ]
    states = torch.cat(teacher_force(decoder, prompts, answers))
    targets = torch.cat(answers)
    loss = functional.cross_entropy(decoder.logits(states).float(), targets, reduction="sum")
    return float(loss), len(targets)


def examine_pair(
    pair: ModelPair, held_out: Corpus, config: PretrainConfig, made: str
) -> dict[str, Any]:
    """Both models' figures, and what drafting by rote reaches on the verifier's own answers.

    ``made``: by what and on which machine they were trained, in words.
    The rote controls learn from the verifier house's reference answers to ``num_scenes`` clips.
    """
    verifier, spoken = examine(pair.verifier, held_out.frames, held_out.facts, "verifier")
    drafter, _ = examine(pair.drafter, held_out.events, held_out.facts, "drafter")
    said = [(QUESTIONS[s.question_index], s.ids) for s in spoken]
    prompts = {q: pair.verifier.prompt(q).after for q in QUESTIONS}
    learned = list(_reference_answers(pair.verifier, config))
    table = NGramTable(5).fit((prompts[question], ids) for question, ids in learned)
    return {
        "config": {field.name: getattr(config, field.name) for field in fields(PretrainConfig)},
        "made": made,
        "num_parameters": {
            role: sum(p.numel() for p in getattr(pair, role).model.parameters())
            for role in ("drafter", "verifier")
        },
        "verifier": verifier.as_dict(),
        "drafter": drafter.as_dict(),
        "controls": {
            "template_accepted_prefix_22": template_prefix(commonest_answers(learned), said),
            "ngram_5_tau_6": ngram_tau(table, [(prompts[q], ids) for q, ids in said]),
        },
    }


def _reference_answers(
    verifier: Decoder, config: PretrainConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    (eos,) = verifier.eos_ids
    for facts in clip_facts(config, config.num_scenes, 0):
        for index, question in enumerate(QUESTIONS):
            text = answer(facts, index, "verifier")
            ids = verifier.tokenizer.encode(text, add_special_tokens=False)
            yield question, (*ids, eos)


def render(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    verifier, drafter, controls = card["verifier"], card["drafter"], card["controls"]
    names = sorted({*verifier["facts_right"], *drafter["facts_right"]})

    def share(report: Mapping[str, Any], name: str) -> str:
        value = report["facts_right"].get(name)
        return "not spoken of" if value is None else f"{value:.1%}"

    rows = [f"| {n} | {share(verifier, n)} | {share(drafter, n)} |" for n in names]
    size = card["num_parameters"]
    config = card["config"]
    is_lab = config["size"] == "lab"
    place = "GPU" if is_lab else "CPU"
    return "\n".join(
        [
            f"# The {'lab' if is_lab else 'tiny'} pair",
            "",
            "Two small multimodal models trained from scratch on synthetic driving scenes, so that",
            "every stage of xsd runs for real on a laptop. They are test equipment: they know",
            "nothing but these scenes. Made with the configuration in `card.json`: an attribute",
            "head first teaches the visual tokens the scene's facts and is dropped; then each",
            "language model learns its own house's answers on frozen vision, from",
            f"{config['num_scenes']} training clips. Made {card['made']}.",
            "",
            f"The figures are of {config['num_held_out']} clips from recordings that were never",
            f"trained on, all ten questions each, by the weights as they are saved, on a {place}.",
            "",
            "| | verifier | drafter |",
            "|---|---|---|",
            f"| parameters | {size['verifier']:,} | {size['drafter']:,} |",
            f"| perplexity of the reference answers | {verifier['perplexity']:.3f} "
            f"| {drafter['perplexity']:.3f} |",
            f"| mean answer length (tokens) | {verifier['mean_length']:.1f} "
            f"| {drafter['mean_length']:.1f} |",
            f"| answers right word for word | {verifier['sentences_right']:.1%} "
            f"| {drafter['sentences_right']:.1%} |",
            "",
            "Facts right (share of the facts in the reference answer that the model's answer",
            "states, in the same order):",
            "",
            "| attribute | verifier | drafter |",
            "|---|---|---|",
            *rows,
            "",
            "Drafting by rote, measured on the verifier's own answers to unseen recordings:",
            "",
            "| control | accept length |",
            "|---|---|",
            "| the commonest training answer of each question, of 22 tokens | "
            f"{controls['template_accepted_prefix_22']:.2f} |",
            f"| a 5-gram table, tau_6 | {controls['ngram_5_tau_6']:.2f} |",
            "",
        ]
    )
