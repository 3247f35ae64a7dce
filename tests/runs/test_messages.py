"""Chat messages as turns, and what is none of it."""

from __future__ import annotations

from typing import Any

import pytest

from tether.runs.messages import chat_turns


def test_turns_are_role_and_content_alone() -> None:
    messages = [{"role": "user", "content": "Hi", "name": "x"}, {"role": "assistant", "content": ""}]
    assert chat_turns(messages) == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]


@pytest.mark.parametrize(
    "found", [None, "text", [], {}, ["text"], [{"role": "user"}], [{"role": 1, "content": "x"}], 7]
)
def test_what_is_no_chat_has_no_turns(found: Any) -> None:
    assert chat_turns(found) is None
