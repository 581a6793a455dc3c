"""What `import batchgen` promises."""

import batchgen


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(batchgen.__all__) == ["__version__", "read", "run"]
    assert all(getattr(batchgen, name) for name in batchgen.__all__)
