"""Plans are made in processes without ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from allmem_megatron.parallel import destroy_model_parallel


@pytest.fixture(autouse=True)
def no_ranks() -> Iterator[None]:
    """Other tests of this process may have made a world of one rank."""
    destroy_model_parallel()
    yield
    destroy_model_parallel()
