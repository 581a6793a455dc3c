"""Templates that want out, all the memory, or all the time; and what honest ones may do.

The attacks run in a child with a limit on its address space, which reports time and peak memory
of each: an attack that gets through would take the test run with it.
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
from batchgen.prompt import budget
from batchgen.prompt.builder import PromptBuilder

NEST = "{% set ns = namespace(x=(1, a)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}"
DEEP = "{% set ns = namespace(x=()) %}{% for i in range(90000) %}{% set ns.x = (ns.x,) %}"
GROW = "{% set ns = namespace(x=a) %}{% for i in range(60) %}"

ATTACKS = {
    # Operators.
    "repeat text": "{{ a * 10**9 }}",
    "repeat text, turned": "{{ 10**9 * a }}",
    "repeat a list": "{{ ([a] * 10**9)|length }}",
    "repeat a tuple": "{{ ((a, a) * 10**9)|length }}",
    "repeat by a row's number": "{{ a * n }}",
    "power": "{{ 10**(10**10) }}{{ a }}",
    "power by a row's number": "{{ n ** n }}",
    "powers in turn": "{% set x = 9**(9**4) %}{{ (x * x * x * x)|string|length }}{{ a }}",
    "percent width": "{{ '%1000000000d' % 1 }}{{ a }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}{{ a }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}{{ a }}",
    "percent many widths": "{{ ('%900000d' * 1000) % ((1,) * 1000) }}{{ a }}",
    "percent mapping": "{{ ('%(k)s' * 90000) % {'k': big} }}{{ a }}",
    "double by plus": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    "double by tilde": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "double by set": GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    "{% endfor %}{{ ns.x|length }}",
    "double a list": "{% set ns = namespace(x=[a]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    # Methods.
    "ljust": "{{ a.ljust(10**9) }}",
    "rjust": "{{ a.rjust(n) }}",
    "center": "{{ a.center(10**9)|length }}",
    "zfill": "{{ a.zfill(10**9) }}",
    "bytes ljust": "{{ a.encode().ljust(10**9)|length }}",
    "int to_bytes": "{{ (1).to_bytes(10**9, 'big')|length }}{{ a }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10**7)|length }}{{ a }}",
    "replace": "{{ big.replace('y', big)|length }}",
    "replace nothing": "{{ big.replace('', big)|length }}",
    "translate": "{{ big.translate({121: big})|length }}",
    "join": "{{ big.join(big)|length }}",
    "join a map": "{{ big.join(range(90000)|map('string'))|length }}",
    "format width": "{{ '{:1000000000}'.format(1) }}{{ a }}",
    "format nested width": "{{ '{:{}}'.format(1, 10**9) }}{{ a }}",
    "format precision": "{{ '{:.1000000000f}'.format(1.5) }}{{ a }}",
    "format again and again": "{{ ('{0}' * 90000).format(big) }}",
    "format_map": "{{ ('{k}' * 90000).format_map({'k': big}) }}",
    "format kept": "{% set f = '{:{}}'.format %}{{ f(1, 10**9) }}{{ a }}",
    "split": "{{ words.split()|length }}{{ words.split()|length }}{{ words.split()|length }}",
    "split by": "{{ (words * 6).split(' ')|length }}",
    "splitlines": "{{ ('ab\\n' * 5000000).splitlines()|length }}{{ a }}",
    "hex number": "{% set x = ('f' * 10000000)|int(base=16) %}{{ x % (x - 7) }}{{ a }}",
    # Filters.
    "filter center": "{{ a|center(10**9) }}",
    "filter center by name": "{{ a|center(width=10**9) }}",
    "filter indent": "{{ ('b\\n' * 10000)|indent(10**6) }}{{ a }}",
    "filter format": "{{ '%1000000000d'|format(1) }}{{ a }}",
    "filter replace": "{{ big|replace('y', big) }}",
    "filter join": "{{ big|join(big) }}",
    "filter batch": "{{ [a]|batch(10**9, a)|list|length }}",
    "filter slice": "{{ [a]|slice(10**9)|list|length }}",
    "filter wordwrap": "{{ (big * 8)|wordwrap(1) }}",
    "filter round": "{{ 1.5|round(10**9) }}{{ a }}",
    "filter tojson": "{{ [[1] * 1000]|tojson(indent=10**6) }}{{ a }}",
    "filter list": "{{ (big * 9)|list|length }}",
    "filter sum": "{{ ([[a]] * 100000)|sum(start=[])|length }}",
    "filter striptags": "{{ ('<!---->' * 1000000)|striptags }}{{ a }}",
    "filter map": "{{ range(100)|map('center', 10**7)|list|length }}{{ a }}",
    "filter pprint": "{{ ([a] * 1000000)|pprint|length }}",
    "filter urlize": "{{ ('http://' * 1000000)|urlize|length }}{{ a }}",
    "filter wordcount": "{{ (words * 9)|wordcount }}",
    "filter upper of a bomb": NEST + "{% endfor %}{{ ns.x|upper|length }}",
    # Values that hold themselves twice, or very deep.
    "print twice held": NEST + "{% endfor %}{{ ns.x }}",
    "json of twice held": NEST + "{% endfor %}{{ ns.x|tojson }}",
    "hash of twice held": NEST + "{% endfor %}{{ {ns.x: 1}|length }}",
    "equal and twice held": NEST + "{% endfor %}{{ ns.x == ns.x ~ a }}",
    "namespaces twice held": "{% set ns = namespace(x=namespace()) %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ [ns.x] }}{{ a }}",
    "hash of deep": DEEP + "{% endfor %}{{ {ns.x: a}|length }}",
    # Loops and calls.
    "nested loops": "{% set r = range(90000) %}{% for i in r %}{% for j in r %}{% for k in r %}"
    "{% endfor %}{% endfor %}{% endfor %}{{ a }}",
    "nested loops that filter": "{% for i in range(90000) %}{% for j in range(90000) if j < 0 %}"
    "{% endfor %}{% endfor %}{{ a }}",
    "data in a loop": "{% for i in range(90000) %}" + "x" * 10000 + "{% endfor %}{{ a }}",
    "data under an if": "{% for i in range(90000) %}{% if i %}" + "x" * 10000 + "{% endif %}"
    "{% endfor %}{{ a }}",
    "print in a loop": "{% for i in range(90000) %}{{ big }}{% endfor %}",
    "search in a loop": "{% for i in range(90000) %}{{ 'zz' in big * 8 }}{% endfor %}",
    "slices kept": "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}"
    "{% set ns.x = ns.x + [big[1:]] %}{% endfor %}{{ ns.x|length }}",
    "huge range": "{{ range(10**9)|list|length }}{{ a }}",
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}{{ a }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}x{% endmacro %}{{ m(60) }}{{ a }}",
    "macro of text in a loop": "{% macro m() %}" + "x" * 10000 + "{% endmacro %}"
    "{% for i in range(90000) %}{{ m() }}{% endfor %}{{ a }}",
    "filter block in a loop": "{% for i in range(90000) %}{% filter upper %}"
    + "x" * 10000
    + "{% endfilter %}{% endfor %}{{ a }}",
    "loop that calls itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}{{ a }}",
    "block that calls itself": "{% block b %}{{ self.b() }}{% endblock %}{{ a }}",
    # Ways out, and what would differ in every run.
    "class": "{{ a.__class__.__mro__ }}",
    "class by format": "{{ '{0.__class__}'.format(a) }}",
    "class by format_map": "{{ '{a.__class__}'.format_map({'a': a}) }}",
    "class by attr": "{{ a|attr('__class__') }}",
    "class by map": "{{ [a]|map(attribute='__class__')|list }}",
    "format by attr": "{{ (a|attr('format')).__self__ }}",
    "globals": "{{ namespace.__init__.__globals__ }}{{ a }}",
    "frame": "{{ (range(3)|map('string')).gi_frame }}{{ a }}",
    "change the row": "{{ items.append(a) }}",
    "print a method": "{{ a.upper }}",
    "print a generator": "{{ items|map('upper') }}",
    "print a namespace": "{{ namespace(x=a) }}",
    "the clock": "{{ day.today() }}{{ a }}",
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

row = {"a": "x", "n": 10**9, "big": "y" * 2**20, "words": "ab " * 1_500_000, "items": ["p"],
       "day": datetime.date(2024, 1, 1)}
for name, template in json.load(sys.stdin).items():
    builder = PromptBuilder(PromptConfig(user=template))
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
    half = budget.MAX_CHARS // 3
    assert all(isinstance(builder.build({"n": half}), list) for _ in range(5))
    assert builder.build({"n": budget.MAX_CHARS + 1}) == RowError(
        "template_error", "the template makes more than 16,777,216 characters"
    )
    assert isinstance(builder.build({"n": half}), list)
