"""Rows that want all the memory or all the time of an honest template; and what may be long.

Each attack is a template that a job's author could have written, and a row that makes it costly
(docs/threat-model.md). They run in a child with a limit on its address space, which reports time
and peak memory of each: an attack that gets through would take the test run with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchgen.core.records import RowError
from batchgen.job.model import PromptConfig
from batchgen.prompt import sandbox
from batchgen.prompt.builder import PromptBuilder

GROW = "{% set ns = namespace(x=a) %}{% for i in many %}"

ATTACKS = {
    # Operators.
    "repeat text": "{{ a * n }}",
    "repeat text, turned": "{{ n * a }}",
    "repeat a list": "{{ ([a] * n)|length }}",
    "repeat a tuple": "{{ ((a, a) * n)|length }}",
    "print a text many times held": "{{ [big] * 100 }}",
    "power": "{{ n ** n }}",
    "power of a power": "{{ (9 ** k) * (9 ** k) * (9 ** k) * (9 ** k) }}",
    "percent width": "{{ percent_width % 1 }}",
    "percent precision": "{{ percent_precision % 1.5 }}",
    "percent star": "{{ '%*d' % (n, 1) }}",
    "percent many widths": "{{ percent_widths % ((1,) * 1000) }}",
    "percent mapping": "{{ percent_keys % {'k': big} }}",
    "double by plus": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    "double by tilde": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "double by set": GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    "{% endfor %}{{ ns.x|length }}",
    "double a list": "{% set ns = namespace(x=[a]) %}{% for i in many %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    "print a huge number": "{{ huge }}",
    # Methods.
    "ljust": "{{ a.ljust(n) }}",
    "rjust": "{{ a.rjust(n) }}",
    "center": "{{ a.center(n) }}",
    "zfill": "{{ a.zfill(n) }}",
    "bytes ljust": "{{ a.encode().ljust(n)|length }}",
    "int to_bytes": "{{ k.to_bytes(n, 'big')|length }}",
    "expandtabs": "{{ tabs.expandtabs(k * 1000)|length }}",
    "replace": "{{ big.replace('y', big)|length }}",
    "replace nothing": "{{ big.replace(nothing, big)|length }}",
    "join": "{{ big.join(big)|length }}",
    "join a map": "{{ big.join(many|map('string'))|length }}",
    "format width": "{{ format_width.format(1) }}",
    "format nested width": "{{ '{:>{}}'.format(a, n) }}",
    "format precision": "{{ '{:.{}f}'.format(1.5, n) }}",
    "format again and again": "{{ format_again.format(big) }}",
    "format_map": "{{ format_keys.format_map({'k': big}) }}",
    "format kept": "{% set f = '{:{}}'.format %}{{ f(1, n) }}",
    "split": "{{ words.split()|length }}{{ words.split()|length }}{{ words.split()|length }}",
    "split by": "{{ (words * 6).split(' ')|length }}",
    "splitlines": "{{ (lines * 500).splitlines()|length }}",
    # Filters.
    "filter center": "{{ a|center(n) }}",
    "filter center by name": "{{ a|center(width=n) }}",
    "filter indent": "{{ lines|indent(k * 100) }}",
    "filter indent by text": "{{ lines|indent(big) }}",
    "filter format": "{{ percent_width|format(1) }}",
    "filter replace": "{{ big|replace('y', big) }}",
    "filter join": "{{ big|join(big) }}",
    "filter join of a map": "{{ many|map('string')|join(big) }}",
    "filter batch": "{{ many|batch(n, a)|list|length }}",
    "filter slice": "{{ many|slice(n)|list|length }}",
    "filter wordwrap": "{{ (big * 8)|wordwrap(79) }}",
    "filter wordwrap by a row's number": "{{ big|wordwrap(one) }}",
    "filter round": "{{ 1.5|round(n) }}",
    "filter tojson": "{{ [many]|tojson(indent=k) }}",
    "filter list": "{{ (big * 9)|list|length }}",
    "filter striptags": "{{ tags|striptags }}",
    "filter map": "{{ many|map('center', k * 1000)|list|length }}",
    "filter wordcount": "{{ (words * 9)|wordcount }}",
    # Loops and calls.
    "nested loops": "{% for i in many %}{% for j in many %}{% for k in many %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "nested loops that filter": "{% for i in many %}{% for j in many if j < 0 %}"
    "{% endfor %}{% endfor %}",
    "text in a loop": "{% for i in many %}" + "x" * 10000 + "{% endfor %}",
    "text under an if": "{% for i in many %}{% if i %}" + "x" * 10000 + "{% endif %}{% endfor %}",
    "print in a loop": "{% for i in many %}{{ big }}{% endfor %}",
    "pieces in a loop": "{% for i in many %}{{ big[i:] }}{% endfor %}",
    "search in a loop": "{% for i in many %}{{ 'zz' in big * 8 }}{% endfor %}",
    "huge range": "{{ range(n)|list|length }}",
    "macro that calls itself": "{% macro m(n) %}{{ m(n - 1) if n }}{% endmacro %}{{ m(n) }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}x{% endmacro %}{{ m(60) }}",
    "macro of text in a loop": "{% macro m() %}" + "x" * 10000 + "{% endmacro %}"
    "{% for i in many %}{{ m() }}{% endfor %}",
    "filter block in a loop": "{% for i in many %}{% filter upper %}"
    + "x" * 10000
    + "{% endfilter %}{% endfor %}",
    "loop over what is deep": "{% for i in deep recursive %}{{ loop(i) }}{% endfor %}",
    "print what is deep": "{{ deep }}",
    "json of what is deep": "{{ deep|tojson }}",
    # What Jinja's own sandbox keeps from rows, and what would differ in every run.
    "an attribute named by a row": "{{ format_class.format(a) }}",
    "change the row": "{{ items.append(a) }}",
    "print a method": "{{ a.upper }}",
    "print a generator": "{{ items|map('upper') }}",
    "the clock": "{{ day.today() }}",
}

DRIVER = """
import datetime, json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from batchgen.job.model import PromptConfig
from batchgen.core.errors import ConfigError
from batchgen.prompt.builder import PromptBuilder

def high_water_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

def reset():
    open("/proc/self/clear_refs", "w").write("5")
    return high_water_mib()

deep = []
for _ in range(5000):
    deep = [deep]
row = {
    "a": "x", "n": 10**9, "k": 9**4, "one": 1, "huge": 10**50_000, "many": list(range(90_000)),
    "big": "y" * 2**20, "words": "ab " * 1_500_000, "lines": "b\\n" * 10_000, "nothing": "",
    "tabs": "\\t" * 1000, "tags": "<!---->" * 1_000_000, "items": ["p"], "deep": deep,
    "percent_width": "%1000000000d", "percent_precision": "%.1000000000f",
    "percent_widths": "%900000d" * 1000, "percent_keys": "%(k)s" * 90_000,
    "format_width": "{:1000000000}", "format_again": "{0}" * 90_000, "format_keys": "{k}" * 90_000,
    "format_class": "{0.__class__}", "day": datetime.date(2024, 1, 1),
}
for name, template in json.load(sys.stdin).items():
    builder = PromptBuilder(PromptConfig(user=template + "{{ a }}"))
    before, started_s = reset(), time.process_time()
    outcome = builder.build(row)
    told = [getattr(outcome, "error_type", "a prompt"), getattr(outcome, "error", "")]
    print(json.dumps([name, time.process_time() - started_s, high_water_mib() - before, *told]),
          flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[float, float, str, str]]:
    """Attack -> seconds, MiB, error type, error; without those after one that killed the child."""
    try:
        told = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps(ATTACKS),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=Path(__file__).parents[2],
        ).stdout
    except subprocess.TimeoutExpired as error:
        told = (error.stdout or b"").decode()
    return {name: tuple(rest) for name, *rest in map(json.loads, told.splitlines())}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_its_row_little_time_and_little_memory(
    outcomes: dict[str, tuple[float, float, str, str]], name: str
) -> None:
    assert name in outcomes, "the child died or hung at this attack, or at one before"
    seconds, mib, error_type, error = outcomes[name]
    assert error_type in {"template_error", "missing_value", "empty_prompt"}, error
    assert seconds < 3
    assert mib < 200
    assert "MemoryError" not in error


HONEST = {
    "{{ a * 3 }}": "xxx",
    "{{ 2 ** 10 }} {{ n * 7 }} {{ n % 7 }}": "1024 7000000000 6",
    "{{ '%05d|%-4s|%.2f' % (7, 'a', 1.5) }}": "00007|a   |1.50",
    "{{ '%(a)s-%(b)d' % {'a': 'x', 'b': 2} }}": "x-2",
    "{{ '{:>4}|{:,}|{!r}'.format(a, n, a) }}": "   x|1,000,000,000|'x'",
    "{{ '{k}'.format_map({'k': a}) }}": "x",
    "{{ a ~ ': ' ~ 3 ~ [1] }}": "x: 3[1]",
    "{{ items|join(', ') }} {{ ', '.join(items) }}": "p, q, r p, q, r",
    "{{ items|map('upper')|join('+') }}": "P+Q+R",
    "{{ 'a b\\nc'.split() }} {{ 'a-b'.split('-') }}": "['a', 'b', 'c'] ['a', 'b']",
    "{{ text|truncate(9) }} {{ text|wordcount }}": "lorem... 400",
    "{{ text[:5] }}{{ items[1:] }}": "lorem['q', 'r']",
    "{{ text.replace('lorem ', '')|length }} {{ a.zfill(3) }}": "0 00x",
    "{{ {'b': 1, 'a': [a]}|tojson }}": '{"a": ["x"], "b": 1}',
    "{{ {'a': 1}|tojson(indent=2) }}": '{\n  "a": 1\n}',
    "{{ 'a\\nb'|indent(2) }} {{ a|center(3) }}|": "a\n  b  x |",
    "{{ 2.567|round(1) }} {{ [1, 2]|sum }} {{ items|batch(2)|list }}": "2.6 3 [['p', 'q'], ['r']]",
    "{% for i in items %}{{ loop.index }}/{{ loop.length }}{{ i }} {% endfor %}": "1/3p 2/3q 3/3r ",
    "{% for i in items if i != 'q' %}{{ i }}{% else %}none{% endfor %}": "pr",
    "{% macro m(b) %}<{{ b }}{{ caller() }}>{% endmacro %}{% call m(2) %}x{% endcall %}": "<2x>",
    "{% set ns = namespace(t=0) %}{% for i in items %}{% set ns.t = ns.t + 1 %}{% endfor %}"
    "{{ ns.t }}": "3",
    "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}": "a=1",
    "{% filter upper %}{{ a }}b{% endfilter %}": "XB",
    "{{ (1, 2) == (1, 2) }} {{ a in [a] }}": "True True",
    "{{ '<b>'|escape }} {{ '<i>x</i>'|striptags }}": "&lt;b&gt; x",
    "{{ text|wordwrap(11)|length }}": "2399",
}


@pytest.mark.parametrize("template", HONEST)
def test_an_honest_template_is_not_in_the_guards_way(template: str) -> None:
    row = {"a": "x", "n": 10**9, "items": ["p", "q", "r"], "text": "lorem " * 400}
    builder = PromptBuilder(PromptConfig(user="{{ a[:0] }}" + template))
    assert builder.build(row) == [{"role": "user", "content": HONEST[template]}]


@pytest.mark.parametrize(
    ("template", "num_items"),
    [
        ("{% for i in items %}{{ i|trim }}: {{ loop.index }}\n{% endfor %}", 100_000),
        ("{{ items|join('\n') }}", 500_000),
        ("{{ items|tojson }}", 300_000),
        (
            "{% set ns = namespace(l=[]) %}{% for i in items %}{% set ns.l = ns.l + [i] %}"
            "{% endfor %}{{ ns.l|join(',') }}",
            1_000,
        ),
    ],
)
def test_a_long_row_is_no_attack(template: str, num_items: int) -> None:
    row: dict[str, Any] = {"items": ["item"] * num_items}
    assert isinstance(PromptBuilder(PromptConfig(user=template)).build(row), list)


def test_a_text_of_millions_of_characters_is_no_attack() -> None:
    row = {"text": " " + "lorem ipsum " * 600_000}
    outcome = PromptBuilder(PromptConfig(user="{{ text|trim }}!")).build(row)
    assert not isinstance(outcome, RowError), outcome


def test_every_render_has_a_budget_of_its_own() -> None:
    builder = PromptBuilder(PromptConfig(user="{{ 'x' * n }}"))
    half = sandbox.MAX_CHARS // 3
    assert all(isinstance(builder.build({"n": half}), list) for _ in range(5))
    assert builder.build({"n": sandbox.MAX_CHARS + 1}) == RowError(
        "template_error", "the template makes more than 16,777,216 characters"
    )
    assert isinstance(builder.build({"n": half}), list)
