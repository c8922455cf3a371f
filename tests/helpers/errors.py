"""Errors that are for people."""

import pytest

from dividemix import DivideMixError


def assert_refused(call, *expected: object) -> str:
    """`call` fails with a DivideMixError of one line that contains each of `expected`. -> the line"""
    with pytest.raises(DivideMixError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and all(str(text) in message for text in expected), message
    return message
