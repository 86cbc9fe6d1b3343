"""Every kind of error has a row in the table, a class, and a place in HTTP and gRPC."""

from __future__ import annotations

from http import HTTPStatus

import grpc
import pytest

from packhorse.serve import errors
from packhorse.serve.errors import ERROR_MAPPINGS, ErrorKind, ServeError


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_is_in_the_table_and_has_a_class(kind: ErrorKind) -> None:
    mapping = ERROR_MAPPINGS[kind]
    assert mapping.http == 499 or HTTPStatus(mapping.http)
    assert mapping.grpc in grpc.StatusCode.__members__
    assert sum(error.kind is kind for error in ServeError.__subclasses__()) == 1


@pytest.mark.parametrize("error", ServeError.__subclasses__())
def test_every_error_is_in_the_tree_at_the_top_of_the_file(error: type[ServeError]) -> None:
    assert f"  {error.__name__} " in (errors.__doc__ or "")


def test_retries_are_for_what_may_pass_later() -> None:
    assert {kind for kind in ErrorKind if ERROR_MAPPINGS[kind].retry} == {
        ErrorKind.OVERLOADED, ErrorKind.UNAVAILABLE,
    }  # fmt: skip
