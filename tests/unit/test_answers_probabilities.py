"""A label's probability is the exact one, or none is given."""

import json
import math
import random
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchgen.answers.probabilities import (
    MAX_AMBIGUOUS,
    label_probabilities,
    value_span,
)
from batchgen.core.records import TokenLogprobs

BIRDS = ["bill", "bird", "cat"]


def step(taken, **others):
    """One token: the one taken with its probability, and others."""
    return step_of(taken, list(others.items()))


def step_of(taken, others):
    token, probability = taken
    top = [(text, math.log(p)) for text, p in [taken, *others]]
    return TokenLogprobs(token, math.log(probability), sorted(top, key=lambda pair: -pair[1]))


def end(probability=1.0, **others):
    return step((None, probability), **others)


def choice(tokens, labels, text=None):
    text = "".join(t.token or "" for t in tokens) if text is None else text
    return label_probabilities(text, tokens, (0, len(text)), labels, "")


def field(tokens, labels):
    """For a JSON object with the one field `a`."""
    text = "".join(t.token or "" for t in tokens)
    return label_probabilities(text, tokens, value_span(text, "a"), labels, '"')


def about(*figures):
    return [None if p is None else pytest.approx(p, abs=1e-9) for p in figures]


def test_one_token_a_label():
    tokens = [step(("bill", 0.7), bird=0.2, cat=0.1), end()]
    assert choice(tokens, BIRDS) == about(0.7, 0.2, 0.1)


def test_the_path_is_walked_on():
    tokens = [step(("bi", 0.8), cat=0.2), step(("rd", 0.25), ll=0.75), end()]
    assert choice(tokens, BIRDS) == about(0.6, 0.2, 0.2)


def test_other_tokens_of_the_same_label_count():
    tokens = [
        step(("bi", 0.5), bill=0.125, bir=0.125, ca=0.125, c=0.125),
        step(("l", 0.5), ll=0.25, rd=0.25),
        step(("l", 1.0)),
        end(),
    ]
    assert choice(tokens, BIRDS) == about(0.5, 0.25, 0.25)


def test_what_could_become_several_labels_gives_them_no_figure():
    tokens = [step(("bill", 0.6), bi=0.2, cat=0.2), end()]
    assert choice(tokens, BIRDS) == about(None, None, 0.2)


def test_a_little_of_that_is_let_pass():
    tokens = [step(("bill", 0.6), bi=0.004, cat=0.396), end()]
    assert choice(tokens, BIRDS) == about(0.6, 0.0, 0.396)
    # But not twice.
    twice = [
        step(("bi", 0.8), b=0.004, cat=0.196),
        step(("l", 0.8), rd=0.195, **{"": 0.005}),
        end(),
    ]
    assert choice(twice, ["bil", "bird", "cat"]) == about(None, None, 0.196)


def test_what_is_in_no_list_makes_the_unseen_unknown():
    tokens = [step(("bill", 0.7), bird=0.2), end()]
    assert choice(tokens, BIRDS) == about(0.7, 0.2, None)
    tokens = [step(("bill", 0.785), bird=0.2), end()]
    assert choice(tokens, BIRDS) == about(0.785, 0.2, 0.0)


def test_what_is_missing_late_is_missing_only_to_labels_still_possible():
    tokens = [step(("bi", 0.8), cat=0.2), step(("ll", 0.5)), end()]
    assert choice(tokens, [*BIRDS, "dog"]) == about(0.4, None, 0.2, 0.0)


def test_tokens_that_fit_no_label_are_missing():
    tokens = [step(("bill", 0.7), bird=0.2, zebra=0.1), end()]
    assert choice(tokens, BIRDS) == about(0.7, 0.2, None)


def test_a_label_that_begins_another_is_told_by_the_end():
    labels = ["no", "north"]
    assert choice([step(("no", 1.0)), end(0.25, rth=0.75)], labels) == about(0.25, 0.75)
    taken = [step(("no", 1.0)), step_of(("rth", 0.75), [(None, 0.25)]), end()]
    assert choice(taken, labels) == about(0.25, 0.75)
    # Cut off, so that nobody knows.
    assert choice([step(("no", 1.0))], labels) == [None, None]


def test_two_end_tokens_are_one_end():
    tokens = [step(("no", 1.0)), step_of((None, 0.5), [(None, 0.25), ("rth", 0.25)])]
    assert choice(tokens, ["no", "north"]) == about(0.75, 0.25)


def test_in_json_the_quote_closes():
    tokens = [
        step(('{"a":"', 1.0)),
        step(("no", 1.0)),
        step(('"', 0.25), rth=0.75),
        step(("}", 1.0)),
        end(),
    ]
    assert field(tokens, ["no", "north"]) == about(0.25, 0.75)


def test_tokens_that_reach_over_the_labels_end():
    tokens = [
        step(('{"a": "', 1.0)),
        step(("bi", 0.5), **{'cat"': 0.25, 'cat"}': 0.25}),
        step(('rd",', 0.5), **{'rd"': 0.25, 'll",': 0.25}),
        step((' "b": 1}', 1.0)),
        end(),
    ]
    assert field(tokens, BIRDS) == about(0.125, 0.375, 0.5)


def test_tokens_that_reach_over_the_labels_start():
    tokens = [step(('{"a"', 1.0)), step((':"bi', 0.5), **{':"c': 0.5}), step(('ll"}', 1.0))]
    assert field(tokens, BIRDS) == about(0.5, 0.0, 0.5)


def test_another_text_before_the_label_does_not_count():
    others = {':"c': 0.25, ': "bi': 0.2, ":null": 0.3}
    tokens = [step(('{"a"', 1.0)), step_of((':"bi', 0.125), [*others.items(), (None, 0.125)])]
    tokens += [step(('ll"}', 1.0))]
    assert field(tokens, BIRDS) == about(1 / 3, 0.0, 2 / 3)


def test_a_shorter_token_before_the_label_could_become_any():
    tokens = [
        step(('{"a"', 1.0)),
        step((':"bi', 0.5), **{':"': 0.25, ":": 0.25}),
        step(('ll"}', 1.0)),
    ]
    assert field(tokens, BIRDS) == [None, None, None]


def test_a_token_not_taken_may_reach_over_the_start():
    # After `"` alone the model cannot say `bill` as it would like to.
    tokens = [
        step(('{"a":', 1.0)),
        step(('"', 0.25), **{'"bill': 0.75}),
        step(("cat", 0.8), bird=0.2),
        step(('"}', 1.0)),
    ]
    assert field(tokens, BIRDS) == about(0.75, 0.05, 0.2)


def test_thresholds_are_relative_to_what_is_not_elsewhere():
    others = {":null": 0.99, ':"c': 0.0006}
    tokens = [step(('{"a"', 1.0)), step_of((':"bill', 0.0094), list(others.items()))]
    tokens += [step(('"}', 1.0))]
    assert field(tokens, ["bill", "cat"]) == about(0.94, 0.06)
    others = {":null": 0.99, ':"c': 0.0006}
    tokens[1] = step_of((':"bill', 0.009), list(others.items()))
    assert field(tokens, ["bill", "cat", "dog"]) == about(0.9, 0.06, None)
    others = {":null": 0.99, ':"c': 0.0006, ':"': 0.001}
    tokens[1] = step_of((':"bill', 0.0084), list(others.items()))
    assert field(tokens, ["bill", "cat"]) == [None, None]


def test_the_token_taken_counts_once_even_where_another_has_its_text():
    tokens = [step_of(("cat", 0.5), [("cat", 0.25), ("bill", 0.25)]), end()]
    assert choice(tokens, ["bill", "cat"]) == about(0.25, 0.75)
    # And it need not be among the likeliest.
    top = [("bill", math.log(0.9)), ("cat", math.log(0.06))]
    tokens = [TokenLogprobs("cat", math.log(0.04), top), end()]
    assert choice(tokens, ["bill", "cat"]) == about(0.9, 0.1)


def test_half_a_character_fits_labels_that_go_on_with_more_than_ascii():
    labels = ["naïf", "naïv", "nada", "no"]
    tokens = [step(("no", 0.5), **{"na\ufffd": 0.25, "nad": 0.25}), end()]
    assert choice(tokens, labels) == about(None, None, 0.25, 0.5)
    assert choice(tokens, labels[1:]) == about(0.25, 0.25, 0.5)
    # vLLM leaves out half a character with what stands before it.
    tokens = [step(("no", 0.5), **{"": 0.5}), end()]
    assert choice(tokens, labels[1:]) == about(0.5, 0.0, 0.5)
    assert choice(tokens, ["nada", "no"]) == [None, None]


def test_a_character_of_several_tokens_on_the_way():
    tokens = [
        step(("na", 1.0)),
        step(("", 0.5), d=0.5),
        step(("ï", 1.0)),
        step(("v", 0.5), f=0.5),
        end(),
    ]
    assert choice(tokens, ["naïv", "naïf", "nada"]) == about(0.25, 0.25, 0.5)


def test_a_single_label_is_certain():
    assert choice([step(("b", 0.5)), step(("ill", 0.5)), end()], ["bill"]) == [1.0]


def test_only_the_place_asked_for_is_looked_at():
    text = '{"x": "bird", "a": "bill", "y": "cat"}'
    tokens = [
        step(('{"x": "', 1.0)),
        step(("bird", 0.1), cat=0.9),
        step(('", "a": "', 1.0)),
        step(("bill", 0.6), cat=0.3, bird=0.1),
        step(('", "y": "', 1.0)),
        step(("cat", 0.2), bird=0.8),
        step(('"}', 1.0)),
        end(),
    ]
    assert field(tokens, BIRDS) == about(0.6, 0.1, 0.3)
    spans = {name: value_span(text, name) for name in "xy"}
    assert label_probabilities(text, tokens, spans["x"], BIRDS, '"') == about(0.0, 0.1, 0.9)
    assert label_probabilities(text, tokens, spans["y"], BIRDS, '"') == about(0.0, 0.8, 0.2)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([step(("bill", 1.0)), step((" ", 1.0)), end()], "bill"),
        ([step(("bi", 1.0)), end()], "bill"),
        ([step(("Bill", 1.0)), end()], "bill"),
        ([step(("bi", 1.0)), end(), step(("ll", 1.0))], "bill"),
        ([step(("\ufffd", 1.0)), step(("\ufffd", 1.0)), end()], "é"),
        ([], "bill"),
        ([step(("dog", 1.0)), end()], "dog"),
        ([step(("bill.", 1.0)), end()], "bill."),
    ],
)
def test_no_figures_where_tokens_and_text_differ_or_there_is_no_label(tokens, text):
    assert label_probabilities(text, tokens, (0, len(text)), BIRDS, "") is None


def test_a_path_that_could_not_come_tells_nothing():
    tokens = [TokenLogprobs("bill", -math.inf, [("cat", -math.inf)]), end()]
    assert choice(tokens, BIRDS) == [None, None, None]
    tokens = [step(('{"a"', 1.0)), TokenLogprobs(':"bill', -math.inf, [(":null", 0.0)])]
    assert field([*tokens, step(('"}', 1.0))], BIRDS) is None


def test_a_label_has_to_be_closed():
    tokens = [step(("bill", 1.0)), step(("ard", 1.0)), end()]
    assert label_probabilities("billard", tokens, (0, 4), BIRDS, "") is None
    assert label_probabilities("billard", tokens, (0, 4), BIRDS, '"') is None


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('{"a":"x"}', "a", "x"),
        (' \n{ "a" :\t"x" , "b" : "y" }\n', "b", "y"),
        ('{"b":{"a":"no"},"c":["a",{"a":"no"}],"a":"yes"}', "a", "yes"),
        ('{"c":"\\"a\\":\\"no\\"","a":"yes"}', "a", "yes"),
        ('{"\\u0061":"x"}', "a", "x"),
        ('{"a":"q\\"\\\\"}', "a", 'q\\"\\\\'),
        ('{"a":""}', "a", ""),
        ('{"a":"old","a":"new"}', "a", "new"),
        ('{"n":' + "9" * 5000 + ',"a":"x"}', "a", "x"),
        ('{"":"x"}', "", "x"),
    ],
)
def test_value_span(text, name, value):
    start, stop = value_span(text, name)
    assert text[start:stop] == value
    assert text[start - 1] + text[stop] == '""'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "{",
        '"a"',
        '["a","x"]',
        '{"b":"a"}',
        '{"a":1}',
        '{"a":null}',
        '{"a":["x"]}',
        '{"a":"x","a":1}',
        '{"a":"x"',
        '{"a":"x",}',
        '{"a":"x"}}',
        '{"a":"x"} {"a":"y"}',
        '{"a" "x"}',
        '{"a":"x" "b":1}',
        '{1:"x","a":"x"}',
        '{a:"x"}',
        '{"a":"x","b":' + "[" * 5000 + "}",
    ],
)
def test_no_span_where_there_is_no_such_string(text):
    assert value_span(text, "a") is None


@given(
    st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.lists(st.text())), st.data()
)
def test_value_span_finds_what_json_has(answer, data):
    indent = data.draw(st.sampled_from([None, 1]))
    text = json.dumps(answer, ensure_ascii=data.draw(st.booleans()), indent=indent)
    for name, value in answer.items():
        span = value_span(text, name)
        assert (span is not None) == isinstance(value, str)
        if span is not None:
            assert json.loads(text[span[0] - 1 : span[1] + 1]) == value


class Model:
    """A language model: texts that its grammar allows, and tokens with chances by what came.

    The chances hang on the tokens before, not on their text alone, as a real model's do.
    """

    def __init__(self, texts, vocabulary, seed):
        self.texts = texts
        self.vocabulary = vocabulary
        self.seed = seed

    @cache  # noqa: B019
    def next(self, tokens):
        """Each possible next token and its chance; None is the end."""
        so_far = "".join(tokens)
        possible = [
            token
            for token in self.vocabulary
            if any(text.startswith(so_far + token) for text in self.texts)
        ]
        if so_far in self.texts:
            possible.append(None)
        chance = random.Random(f"{self.seed} {tokens}")
        weights = {token: chance.choice([1, 1, 1, 5, 40]) for token in possible}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    @cache  # noqa: B019
    def ends(self, tokens):
        """Each whole text and its chance, after these tokens: by every way to write it."""
        total = {}
        for token, chance in self.next(tokens).items():
            after = {"".join(tokens): 1.0} if token is None else self.ends((*tokens, token))
            for text, share in after.items():
                total[text] = total.get(text, 0.0) + chance * share
        return total

    def sample(self, chance):
        tokens, steps = (), []
        while True:
            following = self.next(tokens)
            token = chance.choices(list(following), list(following.values()))[0]
            top = sorted(
                ((text, math.log(p)) for text, p in following.items()), key=lambda pair: -pair[1]
            )
            steps.append(TokenLogprobs(token, math.log(following[token]), top))
            if token is None:
                return steps
            tokens = (*tokens, token)


def first_that_decides(model, tokens, before):
    """The first step with a token that agrees with `before` and goes on into the label."""
    for index in range(len(tokens)):
        so_far = "".join(tokens[:index])
        following = model.next(tuple(tokens[:index]))
        reach = sum(
            p
            for token, p in following.items()
            if token is not None and len(so_far + token) > len(before)
            if (so_far + token).startswith(before)
        )
        taken = tokens[index] if index < len(tokens) else None
        if so_far == before or len(so_far + (taken or "")) > len(before):
            return index
        if reach > MAX_AMBIGUOUS * (reach + following[taken]):
            return index
    return len(tokens)


def truth(model, tokens, before, wholes):
    """What is so: each label's chance, and how much of it nobody could know from the path.

    Told by what each way not taken can still become, on the model's own tree.
    """
    first = first_that_decides(model, tokens, before)
    ends = model.ends(tuple(tokens[:first]))
    agreeing = {text: p for text, p in ends.items() if text.startswith(before)}
    whole = sum(agreeing.values())
    exact = [
        sum(p for text, p in agreeing.items() if text.startswith(label)) / whole for label in wholes
    ]
    unknown = [0.0] * len(wholes)
    mass = 1.0
    for index in range(first, len(tokens) + 1):
        came = tuple(tokens[:index])
        taken = tokens[index] if index < len(tokens) else None
        for token, p in model.next(came).items():
            if token == taken:
                continue
            becomes = {"".join(came)} if token is None else set(model.ends((*came, token)))
            reached = {
                i for i, label in enumerate(wholes) for text in becomes if text.startswith(label)
            }
            if len(reached) > 1:
                for i in reached:
                    unknown[i] += mass * p / whole
        mass *= model.next(came)[taken]
        still = {
            i
            for i, label in enumerate(wholes)
            for text in (model.ends((*came, taken)) if taken is not None else ())
            if text.startswith(label)
        }
        if len(still) <= 1:
            break
    return exact, unknown


PIECES = st.text("abc", min_size=1, max_size=4)
LABELS = st.lists(PIECES, min_size=2, max_size=5, unique=True)


def check(model, tokens, span, labels, closing):
    """One path of a model against the truth."""
    text = "".join(token.token or "" for token in tokens)
    taken = [token.token for token in tokens if token.token is not None]
    found = label_probabilities(text, tokens, span, labels, closing)
    before = text[: span[0]]
    # A bare choice ends with the text: no text has its end as a beginning, but this.
    wholes = [before + label + closing for label in labels]
    if not closing:
        model = Marked(model)
        wholes = [f"{whole}$" for whole in wholes]
    exact, unknown = truth(model, taken, before, wholes)
    for p, really, share in zip(found, exact, unknown, strict=True):
        if p is None:
            assert share > MAX_AMBIGUOUS - 1e-6
        else:
            assert share < MAX_AMBIGUOUS + 1e-6
            assert p == pytest.approx(really, abs=share + 1e-6)


class Marked:
    """A model whose texts all end with `$`, so that one is never another's beginning."""

    def __init__(self, model):
        self.model = model
        self.next = model.next

    def ends(self, tokens):
        return {f"{text}$": p for text, p in self.model.ends(tokens).items()}


@settings(deadline=None, max_examples=300)
@given(LABELS, st.sets(PIECES, max_size=8), st.integers(0, 999))
def test_a_choice_is_exact_or_unknown(labels, pieces, seed):
    model = Model(tuple(labels), tuple(sorted(pieces | set("abc"))), seed)
    tokens = model.sample(random.Random(seed))
    text = "".join(token.token or "" for token in tokens)
    check(model, tokens, (0, len(text)), labels, "")


@settings(deadline=None, max_examples=300)
@given(
    LABELS,
    st.sets(PIECES, max_size=6),
    st.sets(st.sampled_from([':"', ': "', '"}', '{"k":', '{"k":"', ' "']), max_size=4),
    st.lists(st.integers(0, 999), min_size=3, max_size=3),
    st.integers(0, 999),
)
def test_a_field_is_exact_or_unknown(labels, pieces, signs, cuts, seed):
    texts = [f'{{"k":{space}"{label}"}}' for label in labels for space in ("", " ")]
    texts.append('{"k":null}')
    # Tokens that reach over the label's borders, cut out of the texts themselves.
    crossing = {texts[cut % len(texts)][2 + cut % 5 : 7 + cut % 4] for cut in cuts}
    vocabulary = pieces | signs | crossing | set('{"k:}abc nul')
    model = Model(tuple(texts), tuple(sorted(vocabulary)), seed)
    tokens = model.sample(random.Random(seed))
    text = "".join(token.token or "" for token in tokens)
    span = value_span(text, "k")
    assume(span is not None)
    check(model, tokens, span, labels, '"')
