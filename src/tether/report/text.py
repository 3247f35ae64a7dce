"""Text that somebody else wrote, made safe to show: it can neither become markup nor change what stands around it."""

from __future__ import annotations

import html
import re

# what moves or reverses the text around it, or is not to be seen; line breaks and tabs are fine
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape(text: str) -> str:
    """For an element or an attribute. Characters that cannot be seen are shown by their numbers."""
    shown = _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))
    return html.escape(shown, quote=True)


def shorten(text: str, start: int, end: int) -> str:
    """The first and the last characters of a text that is longer than both together, and how many are left out."""
    left_out = len(text) - start - end
    if left_out <= 0:
        return text
    tail = text[len(text) - end :] if end else ""
    return f"{text[:start]} […{left_out:,} characters…] {tail}"
