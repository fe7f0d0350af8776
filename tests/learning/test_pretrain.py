import copy

import numpy as np
import pytest
import torch

from xsd.learning.pretrain.config import PretrainConfig
from xsd.learning.pretrain.corpus import SLOTS, Corpus, _make_clip, clip_facts, label_facts
from xsd.learning.pretrain.language import Lessons, Readout, Rows, shallow, teach_language
from xsd.learning.pretrain.state import Progress
from xsd.learning.pretrain.train import Pupil, TinyModels, pretrain_one
from xsd.pairs.catalog import load_folder
from xsd.pairs.segments import attend_in_segments
from xsd.scenes.language import answer
from xsd.scenes.questions import QUESTIONS

CONFIG = PretrainConfig(
    num_scenes=8,
    clips_per_recording=4,
    facts_epochs=1,
    facts_batch=4,
    gathering_epochs=1,
    gathering_batch=4,
    language_steps=2,
    grown_steps=2,
    drafter_steps=2,
    questions_per_scene=3,
    batch_scenes=2,
    drafter_batch_scenes=2,
    device="cpu",
    num_workers=0,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    clips = [_make_clip((CONFIG, index // 4, index)) for index in range(CONFIG.num_scenes)]
    facts, frames, events = zip(*clips, strict=True)
    return Corpus(list(facts), np.stack(frames), np.stack(events))


@pytest.fixture(scope="module")
def models() -> TinyModels:
    return TinyModels.new(CONFIG)


def lessons_of(pupil: Pupil, corpus: Corpus, num_visual: int) -> Lessons:
    prompts = [pupil.prompts.prompt(question) for question in QUESTIONS]
    (eos,) = pupil.prompts.eos_ids
    return Lessons(
        pupil.prompts.tokenizer,
        [(prompt.before, prompt.after) for prompt in prompts],
        eos,
        num_visual,
        corpus.facts,
        pupil.house,
        batch_scenes=2,
        questions_per_scene=3,
        num_steps=6,
        seed=0,
    )


def test_facts_of_a_corpus_are_known_without_its_pictures(corpus: Corpus) -> None:
    assert list(clip_facts(CONFIG, CONFIG.num_scenes, 0)) == corpus.facts


def test_labels_name_what_is_true(corpus: Corpus) -> None:
    slots = SLOTS["verifier"]
    labels = label_facts(corpus.facts, slots)
    for facts, row in zip(corpus.facts, labels.tolist(), strict=True):
        said = {slot: values[i] for (slot, values), i in zip(slots.items(), row, strict=True)}
        assert said["time"] == facts.time and said["light"] == facts.light
        empty = {slot.split(".")[0] for slot, value in said.items() if value == "empty"}
        assert empty == {"left", "middle", "right"} - {v.lane for v in facts.vehicles}
        for vehicle in facts.vehicles:
            assert said[f"{vehicle.lane}.kind"] == vehicle.kind
            assert said[f"{vehicle.lane}.color"] == vehicle.color
    assert not any("color" in slot or slot in ("time", "light") for slot in SLOTS["drafter"])


def test_a_step_s_lesson_depends_on_the_step_alone(corpus: Corpus, models: TinyModels) -> None:
    pupil = Pupil.of("verifier", models)
    first, again = (lessons_of(pupil, corpus, 136) for _ in range(2))
    assert torch.equal(first[3].ids, again[3].ids) and torch.equal(first[3].clips, again[3].clips)
    epoch = torch.cat([first[step].clips for step in range(4)])
    assert sorted(epoch.tolist()) == list(range(len(corpus.facts))), "an epoch sees every clip once"


def test_a_lesson_s_targets_are_the_answers(corpus: Corpus, models: TinyModels) -> None:
    pupil = Pupil.of("drafter", models)
    rows = lessons_of(pupil, corpus, 21)[0]
    for row, clip in enumerate(rows.clips.tolist()):
        answers = {answer(corpus.facts[clip], q, "drafter") for q in range(len(QUESTIONS))}
        for targets in rows.targets[row, rows.num_prefix :].split(rows.segment_length):
            ids = targets[targets >= 0].tolist()
            assert ids[-1] in pupil.prompts.eos_ids
            assert pupil.prompts.decode_text(ids) in answers


def test_questions_in_one_row_do_not_see_each_other(corpus: Corpus, models: TinyModels) -> None:
    model = copy.deepcopy(models.drafter.model)
    attend_in_segments(model)
    rows = lessons_of(Pupil.of("drafter", models), corpus, 21)[0]

    def states(ids: torch.Tensor) -> torch.Tensor:
        part = Rows(rows.clips, ids, ids, rows.num_prefix, rows.segment_length)
        with torch.no_grad():
            return model(
                ids,
                position_ids=part.positions,
                num_prefix=rows.num_prefix,
                segment_length=rows.segment_length,
                use_cache=False,
            ).last_hidden_state

    together = states(rows.ids)
    for index in range(3):
        start = rows.num_prefix + index * rows.segment_length
        mine = slice(start, start + rows.segment_length)
        alone = states(torch.cat([rows.ids[:, : rows.num_prefix], rows.ids[:, mine]], dim=1))
        torch.testing.assert_close(together[:, mine], alone[:, rows.num_prefix :])


def test_layers_that_come_back_change_nothing_at_first(models: TinyModels) -> None:
    language_model = copy.deepcopy(models.verifier.model.language_model)
    ids = torch.randint(0, 1000, (2, 9))
    with torch.no_grad():
        with shallow(language_model, 5):
            assert len(language_model.layers) == 5
            few = language_model(ids, use_cache=False).last_hidden_state
        assert len(language_model.layers) == 12
        all_of_them = language_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(few, all_of_them)


def test_language_is_learned(corpus: Corpus, models: TinyModels) -> None:
    torch.manual_seed(0)
    pupil = Pupil.of("drafter", copy.deepcopy(models))
    lessons = lessons_of(pupil, corpus, 21)
    lessons.num_steps = 75
    readout = Readout(pupil.language_model, 128, SLOTS["drafter"], 2)
    labels = label_facts(corpus.facts, SLOTS["drafter"])
    tokens = torch.randn(len(corpus.facts), 21, 128)
    progress = Progress(None, "", pupil.model)
    reports = list(
        teach_language(
            lessons, pupil.model, pupil.language_model, tokens, readout, labels, CONFIG, progress
        )
    )
    assert [report.step for report in reports] == [25, 50, 75]
    assert reports[-1].loss < 0.5 * reports[0].loss


def test_both_models_are_made_saved_and_answer(corpus: Corpus, tmp_path) -> None:
    models = TinyModels.new(CONFIG)
    for house in ("verifier", "drafter"):
        reports = list(pretrain_one(house, CONFIG, corpus, models))
        phases = [report.phase.split(".")[1] for report in reports]
        assert phases == sorted(phases, key=["facts", "gathering", "language"].index)
        assert all(np.isfinite(report.loss) for report in reports)
    models.save(tmp_path / "pair")
    pair = load_folder(tmp_path / "pair")
    for decoder in (pair.drafter, pair.verifier):
        assert all(torch.isfinite(p).all() for p in decoder.model.parameters())
