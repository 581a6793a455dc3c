"""One type for a column of files that were written by different programs.

Equal values have many Arrow types: pandas writes `string`, polars `large_string`, an engine that
saw few numbers `int32`, a day without values `null`. Such files are one input. The column's type
is the narrowest that holds every value of both exactly; where there is none, they differ.

Invariant: two types that are equal but for nullability stay what they are, and nothing hangs on
the order of the files. Prompts never see the common type: a row's values are read by its own
file's types, so that its prompt is the same whatever lies beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
from pyarrow import types

_TEXT = {pa.string(), pa.large_string(), pa.string_view()}
_BYTES = {pa.binary(), pa.large_binary(), pa.binary_view()}
_UNITS = ("s", "ms", "us", "ns")
_UTC = frozenset({"UTC", "Z", "+00:00", "Etc/UTC"})


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Find the type that holds every value of both; None if there is none."""
    if one.equals(other) or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    plain = [_plain(kind) for kind in (one, other)]
    if plain != [one, other]:
        return common_type(*plain)
    for is_kind, join in _JOINS:
        if is_kind(one) and is_kind(other):
            return join(one, other)
    return None


def _plain(kind: pa.DataType) -> pa.DataType:
    """Strip what is only an encoding, or a name for another type."""
    if types.is_dictionary(kind):
        return kind.value_type
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_text(kind: pa.DataType) -> bool:
    return kind in _TEXT


def _is_bytes(kind: pa.DataType) -> bool:
    return kind in _TEXT or kind in _BYTES or types.is_fixed_size_binary(kind)


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """As Arrow itself has two types of a kind: the wider, the finer, the one of more digits."""
    schemas = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:  # No decimal has so many digits.
        return None


def _integers(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    signed = {types.is_signed_integer(kind) for kind in (one, other)}
    # Arrow would have int64 for the large numbers of uint64 and negative ones.
    is_lossy = pa.uint64() in (one, other) and len(signed) > 1
    return None if is_lossy else _unified(one, other)


def _timestamps(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    zones = {"UTC" if kind.tz in _UTC else kind.tz for kind in (one, other)}
    unit = max(one.unit, other.unit, key=_UNITS.index)
    return pa.timestamp(unit, zones.pop()) if len(zones) == 1 else None


def _is_list(kind: pa.DataType) -> bool:
    return not types.is_map(kind) and any(
        is_kind(kind)
        for is_kind in (
            *(types.is_list, types.is_large_list, types.is_fixed_size_list),
            *(types.is_list_view, types.is_large_list_view),
        )
    )


def _lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    item = common_type(one.value_type, other.value_type)
    if item is None:
        return None
    if types.is_list(one) and types.is_list(other):
        return pa.list_(item)
    sizes = {getattr(kind, "list_size", None) for kind in (one, other)}
    if len(sizes) == 1 and None not in sizes:
        return pa.list_(item, sizes.pop())
    return pa.large_list(item)


def _structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    fields: dict[str, pa.DataType | None] = {field.name: field.type for field in one}
    for field in other:
        here = fields.get(field.name, pa.null())
        fields[field.name] = None if here is None else common_type(here, field.type)
    is_clear = all(len({field.name for field in kind}) == kind.num_fields for kind in (one, other))
    if not is_clear or None in fields.values():
        return None
    return pa.struct(list(fields.items()))


def _maps(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    key, item = (
        common_type(getattr(one, part), getattr(other, part)) for part in ("key_type", "item_type")
    )
    return None if key is None or item is None else pa.map_(key, item)


_JOINS: tuple[
    tuple[
        Callable[[pa.DataType], bool],
        Callable[[pa.DataType, pa.DataType], pa.DataType | None],
    ],
    ...,
] = (
    (_is_text, lambda *_: pa.large_string()),
    (_is_bytes, lambda *_: pa.large_binary()),
    (types.is_integer, _integers),
    *((kind, _unified) for kind in (types.is_floating, types.is_decimal, types.is_date)),
    (types.is_timestamp, _timestamps),
    *((kind, _unified) for kind in (types.is_time, types.is_duration)),
    (_is_list, _lists),
    (types.is_struct, _structs),
    (types.is_map, _maps),
)
"""Kind of type -> the common type of two of that kind."""
