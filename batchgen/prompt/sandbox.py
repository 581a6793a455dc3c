"""Templates that cannot escape, fill the memory or run for ever.

Jinja's immutable sandbox keeps a template from Python's inside and from changing the row. It does
not stop `'a' * 10**9`. Here everything that can make more than it is given pays from a `Budget`
first: operators, calls, filters, `~`, list literals, slices, what is printed, and every turn of a
loop. Jinja lets all but four of these be intercepted; the four are wrapped in the syntax tree.

Rendering stays in process, because a child per row would cost more than the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, meta, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from batchgen.prompt.budget import (
    FILTER_COSTS,
    METHOD_COSTS,
    Budget,
    operator_cost,
    spec_cost,
    weigh,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2.runtime import Context

    Render = Callable[[dict[str, Any]], str]

# These answer with what exists already, or in constant space.
_FREE_FILTERS = frozenset(
    {"length", "count", "default", "d", "first", "last", "attr", "map", "select", "reject"}
    | {"selectattr", "rejectattr"}
)
# A prompt is a function of its row: neither chance nor the clock has a say.
_BANNED_FILTERS = ("random",)
_BANNED_GLOBALS = ("lipsum",)
_CLOCK = frozenset({"now", "today", "utcnow"})
_OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class NullPrintedError(Exception):
    """A template prints a null."""


class _Null:
    """A column's null inside a template: may be tested, not printed.

    `{% if x %}`, `x is none` and `x or "unknown"` do what they should; anything that would turn
    the null into text raises, so that the word "None" never gets into a prompt.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise NullPrintedError

    __repr__ = __str__
    __format__ = __iter__ = __len__ = __getitem__ = __add__ = __radd__ = __call__ = (
        lambda self, *_: str(self)
    )


NULL = _Null()


class _Namespace(Namespace):
    """`namespace()`, which cannot be printed: one that holds itself twice would never end."""

    def __repr__(self) -> str:
        msg = "a namespace cannot be printed"
        raise TypeError(msg)


class _Undefined(StrictUndefined):
    """Cannot be printed as an item of a list either."""

    __slots__ = ()
    __repr__ = StrictUndefined.__str__


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles one template and renders it within its budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Unoptimized: the optimizer would run filters on constants before any budget.
        super().__init__(undefined=_Undefined, optimized=False, keep_trailing_newline=False)
        self.budget = Budget()
        self.finalize = self._printed
        for name in _BANNED_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            if name not in _FREE_FILTERS:
                self.filters[name] = _paying(self.budget, name, function)
        self.filters |= {
            _TURN: self._turn,
            _DATA: self._data,
            _CONCAT: self._concat,
            _HOLD: self.budget.hold,
        }
        self.tests["none"] = _is_none
        self.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _null_to_json}
        self.names = {**self.globals, "namespace": _Namespace}
        for name in _BANNED_GLOBALS:
            del self.names[name]
        self.globals = {}  # So that a column may have the name of a global.

    def compile_template(self, source: str) -> tuple[Render, frozenset[str]]:
        """Return how to render a template, and the names that it looks up.

        Raises:
            TemplateSyntaxError: It is no template, or wants another file.
            Exception: Whatever the compiler makes of 10,000 open brackets.
        """
        self.budget.refill()
        names = frozenset(meta.find_undeclared_variables(self.parse(source)))
        template = self.from_string(source, globals=self.names)
        known = {name: self.names[name] for name in names & self.names.keys()}
        budget, concat, root = self.budget, self.concat, template.root_render_func

        def render(values: dict[str, Any]) -> str:
            budget.refill()
            # As `template.render(values)` does, but that copies every global three times a row.
            scope = {**known, **values} if known else values
            return concat(root(self.context_class(self, scope, None, template.blocks)))

        return render, names

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(_OTHER_FILES):
            msg = f"{type(node).__name__.lower()} reads another file, which a prompt cannot"
            raise TemplateSyntaxError(msg, node.lineno)
        guarded: nodes.Template = _Guards(self).visit(tree)
        return guarded

    @pass_context
    def _printed(self, _: Context, value: object) -> object:
        if type(value) is str:
            self.budget.spend(len(value))
            return value
        if value is None or value is NULL:
            raise NullPrintedError
        is_text = not callable(value) and not isinstance(value, Iterator)
        if not is_text and not isinstance(value, Undefined):
            # As text they would be an address, another one in every run.
            msg = f"the template prints a {type(value).__name__}, expected text"
            raise TypeError(msg)
        self.budget.spend(weigh(value))
        return value

    def _turn(self, chars: int) -> None:
        self.budget.step()
        self.budget.spend(chars)

    def _data(self, chars: int) -> str:
        self.budget.spend(chars)
        return ""

    def _concat(self, *parts: object) -> str:
        if None in parts:
            raise NullPrintedError
        self.budget.spend(sum(map(weigh, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401, D102
        self.budget.step()
        self.budget.spend(operator_cost(operator, left, right))
        if operator == "%" and isinstance(right, tuple) and None in right:
            raise NullPrintedError
        made = super().call_binop(context, operator, left, right)
        return made if isinstance(made, str | bytes) else self.budget.hold(made)

    # Positional, and named so that no keyword of a template's call can clash.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102, N805
        budget = __self.budget
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if owner is not None:
            name = getattr(__obj, "__name__", "")
            if name in _CLOCK:
                msg = f"{name}() reads the clock: the prompt would differ in every run"
                raise TypeError(msg)
            if isinstance(owner, str | bytes | int) and (cost := METHOD_COSTS.get(name)):
                if name == "join" and args:
                    args = (list(args[0]), *args[1:])
                budget.spend(cost(owner, (*args, *kwargs.values())))
        return budget.charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: ANN401
        """As Jinja's, with a formatter that pays."""
        if getattr(value, "__name__", None) not in {"format", "format_map"}:
            return None
        text = getattr(value, "__self__", None)
        if not isinstance(text, str):
            return None
        formatter = _PayingFormatter(self)
        is_map = value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:  # noqa: ANN401
            if is_map:
                (kwargs,), args = args, ()
            return formatter.vformat(str(text), args, kwargs)

        return formatted


class _PayingFormatter(SandboxedFormatter):
    """`str.format`, whose widths may come from values."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._budget = sandbox.budget

    def convert_field(self, value: Any, conversion: Any) -> Any:  # noqa: ANN401
        if conversion is None:
            return value
        self._budget.spend(weigh(value))
        return self._budget.charge(super().convert_field(value, conversion))

    def format_field(self, value: Any, format_spec: str) -> str:  # noqa: ANN401
        if value is None:
            raise NullPrintedError
        self._budget.spend(spec_cost(format_spec) + weigh(value))
        text: str = super().format_field(value, format_spec)
        return text


def _paying(budget: Budget, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter: pays for what it will make, then for what it made."""
    cost = FILTER_COSTS.get(name)
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        budget.step()
        value, rest = args[skip], (*args[skip + 1 :], *kwargs.values())
        if cost is not None:
            budget.spend(cost(value, rest))
        if name == "join" and value is not NULL:
            value = value if isinstance(value, str) else list(value)
            budget.spend(len(value) * max(map(weigh, rest), default=0) + weigh(value))
            args = (*args[:skip], value, *args[skip + 1 :])
        return budget.charge(function(*args, **kwargs))

    return paying


# Filters of the guards. No template can name one: names of filters hold no blank.
_TURN = "a turn"
_DATA = "data in a loop"
_CONCAT = "a concatenation"
_HOLD = "a new list"


class _Guards(NodeTransformer):
    """Wraps what Jinja compiles to plain Python: `~`, literals, slices, loops."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._num_loops = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self._num_loops += 1
        self.generic_visit(node)
        self._num_loops -= 1
        turn = self._filter(nodes.Const(0), _TURN, node.lineno)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        data = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if data and self._num_loops:
            node.nodes.insert(0, self._filter(nodes.Const(data), _DATA, node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        first, *rest = node.nodes
        return self._filter(first, _CONCAT, node.lineno, rest)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        is_slice = isinstance(node.arg, nodes.Slice)
        return self._filter(node, _HOLD, node.lineno) if is_slice else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, _HOLD, node.lineno)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, _HOLD, node.lineno) if node.ctx == "load" else node

    def _filter(
        self, value: nodes.Expr, name: str, lineno: int, args: list[nodes.Expr] | None = None
    ) -> nodes.Filter:
        made = nodes.Filter(value, name, args or [], [], None, None, lineno=lineno)
        made.set_environment(self._sandbox)
        return made


def _is_none(value: object) -> bool:
    return value is None or value is NULL


def _null_to_json(value: object) -> None:
    if value is not NULL:
        msg = f"{type(value).__name__} is not JSON"
        raise TypeError(msg)
