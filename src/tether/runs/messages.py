"""Chat prompts as people read them: turns of a role and a text. Knows data of any form; nothing of templates."""

from __future__ import annotations

import json
from typing import Any

from tether.chat import said

Turns = list[dict[str, str]]


def chat_turns(messages: Any) -> Turns | None:
    """Role and content of each message; None where these are no chat messages."""
    if not isinstance(messages, list) or not messages:
        return None
    turns = []
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or not (
            isinstance(content, str) or (content is None and message.get("tool_calls"))
        ):
            return None
        turns.append({"role": role, "content": said(message)})
    return turns


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: text as it is, messages with who says them."""
    if isinstance(prompt, str):
        return prompt
    turns = chat_turns(prompt)
    if turns is None:
        return json.dumps(prompt, ensure_ascii=True, default=str)
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
