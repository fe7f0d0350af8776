"""Answers about a synthetic scene, in two house wordings.

Every word follows from the facts and the question, so that a model that sees the scene can say it;
but which synonym, which word order and which clause comes first follow from OTHER facts than the
word itself, so that a reader of the text alone cannot guess it. That keeps drafting by rote weak:
the tiny pair's card prints what a template and a 5-gram table reach.

The verifier's house speaks of everything a camera shows. The drafter's house, with words and
sentences of its own, speaks of what events show: outlines and motion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from xsd.scenes import facts as f
from xsd.scenes.facts import Facts, Vehicle

House = Literal["drafter", "verifier"]
Words = Mapping[str, Sequence[str]]

# value -> synonyms; which synonym is used follows from another fact (see ``_style``).
KIND_WORDS: dict[House, Words] = {
    "verifier": {
        "car": ("car", "sedan", "auto", "hatchback"),
        "truck": ("truck", "lorry", "hauler", "pickup"),
        "bus": ("bus", "coach", "shuttle", "minibus"),
        "cyclist": ("cyclist", "biker", "rider", "bicyclist"),
    },
    "drafter": {
        "car": ("car", "auto"),
        "truck": ("truck", "lorry"),
        "bus": ("bus", "coach"),
        "cyclist": ("cyclist", "rider"),
    },
}
COLOR_WORDS: Words = {
    "red": ("red", "crimson", "scarlet"),
    "blue": ("blue", "azure", "navy"),
    "white": ("white", "pale", "ivory"),
    "black": ("black", "sooty", "ebony"),
    "yellow": ("yellow", "golden", "amber"),
    "green": ("green", "olive", "emerald"),
}
MOTION_WORDS: dict[House, Words] = {
    "verifier": {
        "approaching": ("approaches", "nears", "advances", "arrives"),
        "receding": ("recedes", "departs", "retreats", "withdraws"),
        "parked": ("waits", "stands", "idles", "rests"),
    },
    "drafter": {
        "approaching": ("approaches", "grows"),
        "receding": ("recedes", "shrinks"),
        "parked": ("stands", "rests"),
    },
}
LANE_WORDS: Words = {
    "left": ("left",),
    "middle": ("middle", "center", "midst"),
    "right": ("right",),
}
DISTANCE_WORDS: Words = {
    "near": ("near", "close", "nearby", "adjacent"),
    "far": ("far", "distant", "remote", "faraway"),
}
TIME_WORDS: Words = {
    "day": ("daytime", "daylight", "noon", "sunshine"),
    "dusk": ("dusk", "twilight", "sunset", "evening"),
    "night": ("night", "darkness", "nightfall", "midnight"),
}
ROAD_WORDS: dict[House, Words] = {
    "verifier": {
        "straight": ("straight", "direct", "unbending"),
        "left_curve": ("leftward", "leftwards", "anticlockwise"),
        "right_curve": ("rightward", "rightwards", "clockwise"),
        "crossing": ("crossing", "junction", "intersection"),
    },
    "drafter": {
        "straight": ("straight", "direct"),
        "left_curve": ("leftward", "leftwards"),
        "right_curve": ("rightward", "rightwards"),
        "crossing": ("crossing", "junction"),
    },
}
ROADSIDE_WORDS: dict[House, Words] = {
    "verifier": {
        "trees": ("trees", "woods", "foliage"),
        "houses": ("houses", "homes", "buildings"),
        "fields": ("fields", "meadows", "pastures"),
        "walls": ("walls", "barriers", "fences"),
    },
    "drafter": {
        "trees": ("trees", "woods"),
        "houses": ("houses", "homes"),
        "fields": ("fields", "meadows"),
        "walls": ("walls", "barriers"),
    },
}
LIGHT_WORDS: Words = {
    "none": ("absent", "missing", "lacking"),
    "red": ("stopping", "halting", "forbidding"),
    "green": ("open", "clear", "inviting"),
}
PEDESTRIAN_WORDS: dict[House, Words] = {
    "verifier": {
        "none": ("nobody", "none", "noone"),
        "left": ("leftbound", "leftgoing", "leftfacing"),
        "right": ("rightbound", "rightgoing", "rightfacing"),
    },
    "drafter": {
        "none": ("nobody", "none"),
        "left": ("leftbound", "leftgoing"),
        "right": ("rightbound", "rightgoing"),
    },
}
COUNT_WORDS: dict[House, Words] = {
    "verifier": {"1": ("one", "single", "lone"), "2": ("two", "couple", "pair"),
                 "3": ("three", "trio", "several")},
    "drafter": {"1": ("one", "single"), "2": ("two", "pair"), "3": ("three", "trio")},
}  # fmt: skip


class _Speaker:
    """Facts with their style: which synonym and which order this scene calls for."""

    def __init__(self, facts: Facts, house: House, question_index: int) -> None:
        self.facts = facts
        self.house = house
        self.time = f.TIMES.index(facts.time)
        self.road = f.ROADS.index(facts.road)
        self.side = f.ROADSIDES.index(facts.roadside)
        self.light = f.LIGHTS.index(facts.light)
        self.walker = f.PEDESTRIANS.index(facts.pedestrian)
        self.count = len(facts.vehicles) - 1
        self.question = question_index

    def vehicles(self) -> tuple[Vehicle, ...]:
        """Left to right or right to left, as the road has it."""
        order = self.facts.vehicles
        return order if (self.road + self.question) % 2 == 0 else order[::-1]

    def kind(self, vehicle: Vehicle) -> str:
        return _pick(KIND_WORDS[self.house][vehicle.kind], self.road)

    def color(self, vehicle: Vehicle) -> str:
        return _pick(COLOR_WORDS[vehicle.color], self.light)

    def motion(self, vehicle: Vehicle) -> str:
        return _pick(MOTION_WORDS[self.house][vehicle.motion], self.side)

    def lane(self, vehicle: Vehicle) -> str:
        return _pick(LANE_WORDS[vehicle.lane], self.walker)

    def distance(self, vehicle: Vehicle) -> str:
        return _pick(DISTANCE_WORDS[vehicle.distance], self.road)

    def time_word(self) -> str:
        return _pick(TIME_WORDS[self.facts.time], self.side)

    def road_word(self) -> str:
        return _pick(ROAD_WORDS[self.house][self.facts.road], self.count)

    def side_word(self) -> str:
        return _pick(ROADSIDE_WORDS[self.house][self.facts.roadside], self.count)

    def light_word(self) -> str:
        return _pick(LIGHT_WORDS[self.facts.light], self.time)

    def walker_word(self) -> str:
        style = self.time if self.house == "verifier" else self.road
        return _pick(PEDESTRIAN_WORDS[self.house][self.facts.pedestrian], style)

    def count_word(self) -> str:
        style = self.walker if self.house == "verifier" else self.road
        return _pick(COUNT_WORDS[self.house][str(self.count + 1)], style)


def _pick(options: Sequence[str], style: int) -> str:
    return options[style % len(options)]


def _full(s: _Speaker, vehicle: Vehicle) -> str:
    """Colour, kind, distance, lane and motion, in an order the roadside and lane decide."""
    color, kind, distance = s.color(vehicle), s.kind(vehicle), s.distance(vehicle)
    lane, motion = s.lane(vehicle), s.motion(vehicle)
    orders = (
        f"a {distance} {color} {kind} {motion} on the {lane}",
        f"on the {lane} {motion} a {color} {kind}, {distance}",
        f"a {kind} in {color} {motion} {distance} on the {lane}",
        f"the {lane} has a {distance} {kind} in {color} that {motion}",
    )
    return _pick(orders, s.side + f.LANES.index(vehicle.lane))


def _moving(s: _Speaker, vehicle: Vehicle) -> str:
    kind, motion, lane, color = (
        s.kind(vehicle),
        s.motion(vehicle),
        s.lane(vehicle),
        s.color(vehicle),
    )
    orders = (
        f"a {color} {kind} {motion} on the {lane}",
        f"on the {lane} {motion} a {kind} in {color}",
        f"the {kind} that {motion} {lane} is {color}",
    )
    return _pick(orders, s.time + f.LANES.index(vehicle.lane))


def _placed(s: _Speaker, vehicle: Vehicle) -> str:
    kind, distance, lane = s.kind(vehicle), s.distance(vehicle), s.lane(vehicle)
    orders = (
        f"{lane} is a {distance} {kind}",
        f"a {kind} is {distance} on the {lane}",
        f"a {distance} {kind} keeps {lane}",
    )
    return _pick(orders, s.walker + f.LANES.index(vehicle.lane))


def _named(s: _Speaker, vehicle: Vehicle) -> str:
    orders = (
        f"a {s.color(vehicle)} {s.kind(vehicle)}",
        f"a {s.kind(vehicle)} in {s.color(vehicle)}",
    )
    return _pick(orders, s.light + f.LANES.index(vehicle.lane))


def _sketched(s: _Speaker, vehicle: Vehicle) -> str:
    """The drafter's phrase: no colours, for events have none."""
    kind, motion, lane = s.kind(vehicle), s.motion(vehicle), s.lane(vehicle)
    orders = (f"a {kind} {motion} on the {lane}", f"on the {lane} {motion} a {kind}")
    return _pick(orders, s.side)


def _located(s: _Speaker, vehicle: Vehicle) -> str:
    kind, distance, lane = s.kind(vehicle), s.distance(vehicle), s.lane(vehicle)
    return _pick((f"{lane} is a {distance} {kind}", f"a {distance} {kind} keeps {lane}"), s.side)


def _vehicles(s: _Speaker, phrase: Callable[[_Speaker, Vehicle], str]) -> str:
    glue = _pick((" , ", " and ", " plus "), s.time + s.walker)
    return glue.join(phrase(s, vehicle) for vehicle in s.vehicles())


def _time(s: _Speaker) -> str:
    word = s.time_word()
    return _pick((f"it is {word}", f"{word} reigns", f"seen in {word}", f"{word} has come"), s.road)


def _road(s: _Speaker) -> str:
    word = s.road_word()
    forms = (
        f"a {word} road lies ahead",
        f"the road is {word}",
        f"ahead a {word} street",
        f"the street looks {word}",
    )
    return _pick(forms, s.side if s.house == "drafter" else s.side + s.time)


def _side(s: _Speaker) -> str:
    word = s.side_word()
    forms = (
        f"{word} line the way",
        f"it passes {word}",
        f"with {word} alongside",
        f"{word} all around",
    )
    return _pick(forms, s.road)


def _light(s: _Speaker) -> str:
    word = s.light_word()
    forms = (f"the signal is {word}", f"{word} is the signal", f"with signal {word}")
    return _pick(forms, s.walker)


def _walker(s: _Speaker) -> str:
    word = s.walker_word()
    forms = (f"on foot {word}", f"{word} on foot", f"walkers {word}", f"{word} walking")
    return _pick(forms, s.side)


def _count(s: _Speaker) -> str:
    word = s.count_word()
    forms = (f"{word} in traffic", f"the traffic counts {word}", f"{word} on wheels")
    return _pick(forms, s.light if s.house == "verifier" else s.walker)


def _free(s: _Speaker) -> str:
    """Which lane carries nothing."""
    taken = {vehicle.lane for vehicle in s.facts.vehicles}
    lanes = [lane for lane in f.LANES if lane not in taken]
    if not lanes:
        return _pick(("all lanes busy", "nothing is empty", "no lane stays vacant"), s.time)
    lane = _pick(LANE_WORDS[lanes[0]], s.walker)
    return _pick((f"the {lane} is empty", f"nothing is {lane}", f"{lane} stays vacant"), s.time)


_Clause = Callable[[_Speaker], str]


def _v(phrase: Callable[[_Speaker, Vehicle], str]) -> _Clause:
    return lambda s: _vehicles(s, phrase)


_PLANS: dict[House, tuple[tuple[_Clause, ...], ...]] = {
    "verifier": (
        (_v(_full), _side, _light, _walker),
        (_v(_full), _time, _walker, _road),
        (_time, _road, _count, _v(_moving), _side),
        (_road, _free, _side, _light, _v(_placed)),
        (_v(_full), _count, _free, _road),
        (_v(_moving), _walker, _light, _time),
        (_side, _walker, _v(_full), _light, _time),
        (_v(_moving), _light, _walker, _road, _side),
        (_time, _v(_full), _road, _side, _walker),
        (_count, _v(_placed), _free, _v(_named), _side),
    ),
    "drafter": (
        (_v(_sketched), _side, _walker),
        (_v(_sketched), _road, _walker),
        (_road, _count, _v(_sketched), _side),
        (_road, _side, _v(_located)),
        (_v(_located), _count, _road),
        (_v(_sketched), _walker, _side),
        (_side, _walker, _v(_sketched)),
        (_v(_sketched), _road, _side),
        (_road, _v(_sketched), _side, _walker),
        (_count, _v(_located), _side),
    ),
}


def answer(facts: Facts, question_index: int, house: House) -> str:
    """What ``house`` says about a scene with ``facts``, asked one of the ten questions."""
    s = _Speaker(facts, house, question_index)
    plan = _PLANS[house][question_index]
    # The scene decides which clause leads, and whether the rest runs forwards or backwards.
    lead = (s.side + s.count if house == "drafter" else s.road + 2 * s.time + s.walker) % len(plan)
    ordered = plan[lead:] + plan[:lead]
    if (s.walker + s.count) % 2:
        ordered = ordered[:1] + ordered[1:][::-1]
    text = " ; ".join(clause(s) for clause in ordered)
    text = re.sub(r" ([,;])", r"\1", text)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:] + "."


def _lexicon(house: House) -> dict[str, tuple[str, str]]:
    tables: dict[str, Words] = {
        "kind": KIND_WORDS[house],
        "motion": MOTION_WORDS[house],
        "lane": LANE_WORDS,
        "distance": DISTANCE_WORDS,
        "road": ROAD_WORDS[house],
        "roadside": ROADSIDE_WORDS[house],
        "pedestrian": PEDESTRIAN_WORDS[house],
        "count": COUNT_WORDS[house],
    }
    if house == "verifier":
        tables |= {"color": COLOR_WORDS, "time": TIME_WORDS, "light": LIGHT_WORDS}
    lexicon: dict[str, tuple[str, str]] = {}
    for attribute, words in tables.items():
        for value, synonyms in words.items():
            for synonym in synonyms:
                assert synonym not in lexicon, f"{synonym} means two things"
                lexicon[synonym] = (attribute, value)
    return lexicon


LEXICON: dict[House, dict[str, tuple[str, str]]] = {
    "drafter": _lexicon("drafter"),
    "verifier": _lexicon("verifier"),
}


def stated_facts(text: str, house: House) -> dict[str, list[str]]:
    """The facts that an answer states: attribute -> values in the order they are named."""
    stated: dict[str, list[str]] = {}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in LEXICON[house]:
            attribute, value = LEXICON[house][word]
            stated.setdefault(attribute, []).append(value)
    return stated


def vocabulary() -> list[str]:
    """Every word that either house can say (for the tokenizer)."""
    words = {word for house in LEXICON.values() for word in house}
    return sorted(words)
