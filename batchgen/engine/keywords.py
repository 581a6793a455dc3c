"""The keywords that the installed vLLM takes, read from its source: importing it takes seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ARGS, LLM = Path("engine", "arg_utils.py"), Path("entrypoints", "llm.py")


def known_keywords() -> frozenset[str] | None:
    """Every keyword of the installed vLLM's `LLM(...)`; None if they cannot be told."""
    try:
        spec = find_spec("vllm")  # Of a package at the top nothing is executed.
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return next((found for place in places or () if (found := read_keywords(Path(place)))), None)


@cache
def read_keywords(package: Path) -> frozenset[str] | None:
    """The same of a vLLM in a folder.

    Source:
        LLM.__init__ gives what it does not know itself to EngineArgs, a dataclass without a base:
        vllm/entrypoints/llm.py and vllm/engine/arg_utils.py, 0.26 to 0.33.

    Returns:
        None where the source is not there, or not as expected.
    """
    try:
        trees = [ast.parse((package / path).read_bytes()) for path in (ARGS, LLM)]
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None
    args, llm = _class(trees[0], "EngineArgs"), _class(trees[1], "LLM")
    if args is None or llm is None or args.bases:
        return None
    own = set(_parameters(llm.body))
    fields = {name for name, kind in _fields(args.body) if "ClassVar" not in kind}
    return frozenset(own | fields) if own and fields else None


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    found = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next(found, None)


def _fields(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation)


def _parameters(body: Iterable[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (arg.arg for arg in (*node.args.args[1:], *node.args.kwonlyargs))
