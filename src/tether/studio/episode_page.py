"""An episode as one HTML file that loads nothing and runs nothing: tokens coloured by advantage, and a table of steps.

Everything that a model wrote goes through `escape`; a content security policy in the file forbids the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tether.report.text import escape

SHADES = 8  # of each sign
COLUMNS = {
    "log_prob": "log π_old",
    "new_log_prob": "log π",
    "reference_log_prob": "log π_ref",
    "kl": "KL",
    "value": "V(s)",
    "reward": "reward",
    "advantage": "advantage",
    "return": "return",
    "entropy": "entropy",
    "ratio": "ratio",
}
FACTS = ("iteration", "score", "reward", "kl", "length")
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; margin: 0; }
section { margin: 1.5rem 0; }
h2 { font-size: 1rem; }
.steps { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid rgb(128 128 128 / .3); }
td.text { text-align: left; font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
dt { font-size: 13px; font-weight: 600; }
dd { margin: 0 0 .6rem; }
.clipped { text-decoration: underline dotted; }
"""


def episode_page(run: str, episode: Mapping[str, Any]) -> str:
    """The document; `episode` is what the page of the studio gets."""
    steps = episode["steps"]
    title = f"{escape(run)} · episode {episode['id']}"
    largest = max((abs(value) for value in map(_known, steps["advantage"]) if value is not None), default=0.0)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · Tether</title>\n<style>{STYLE}{_shades()}</style></head>\n<body><main>\n"
        f"<h1>{title}</h1>\n<p>{_facts(episode)}</p>\n"
        f"<section><h2>Prompt</h2>{_prompt(episode)}</section>\n"
        "<section><h2>Response, coloured by advantage</h2>\n"
        f"<p>Blue was better than the critic expected, orange worse; the strongest is ±{largest:.3g}.</p>\n"
        f"<pre>{_tokens(steps, largest)}</pre></section>\n"
        f'<section class="steps"><h2>Steps</h2>\n{_table(steps)}</section>\n'
        "<footer>Written by Tether's studio. This file loads nothing and runs no scripts.</footer>\n"
        "</main></body></html>\n"
    )


def _prompt(episode: Mapping[str, Any]) -> str:
    """The turns of a chat, and in a fold what the model read; any other prompt as it is."""
    raw = f"<pre>{escape(episode['prompt'])}</pre>"
    if episode["messages"] is None:
        return raw
    turns = "".join(
        f"<dt>{escape(turn['role'])}</dt><dd><pre>{escape(turn['content'])}</pre></dd>" for turn in episode["messages"]
    )
    return f"<dl>{turns}</dl><details><summary>Raw text</summary>{raw}</details>"


def _facts(episode: Mapping[str, Any]) -> str:
    facts = [f"{name} {_number(episode[name])}" for name in FACTS]
    facts.append("terminated" if episode["terminated"] else "truncated" if episode["truncated"] else "unfinished")
    return escape(" · ".join(facts))


def _tokens(steps: Mapping[str, Any], largest: float) -> str:
    pieces = []
    clipped = steps["clipped"] or [False] * len(steps["action"])
    for step, (action, advantage) in enumerate(zip(steps["action"], steps["advantage"], strict=True)):
        known = _known(advantage)
        shade = 0 if known is None or largest == 0 else math.ceil(abs(known) / largest * SHADES)
        names = [f"{'p' if (known or 0) > 0 else 'n'}{shade}"] if shade else []
        names += ["clipped"] if clipped[step] else []
        kind = f' class="{" ".join(names)}"' if names else ""
        pieces.append(f'<span{kind} title="step {step}, advantage {_number(advantage)}">{escape(str(action))}</span>')
    return "".join(pieces)


def _table(steps: Mapping[str, Any]) -> str:
    columns = [name for name in COLUMNS if steps[name] is not None]
    states: Sequence[Any] | None = steps["state"]
    head = [
        "step",
        *(["state"] if states else []),
        "action",
        *(COLUMNS[name] for name in columns),
        *(["clipped"] if steps["clipped"] else []),
    ]
    rows = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for step, action in enumerate(steps["action"]):
        texts = [states[step], action] if states else [action]
        cells = [f'<td class="text">{escape(str(text))}</td>' for text in texts]
        cells += [f"<td>{_number(steps[name][step])}</td>" for name in columns]
        if steps["clipped"]:
            cells.append(f"<td>{'yes' if steps['clipped'][step] else ''}</td>")
        rows.append(f"<tr><td>{step}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>\n"


def _shades() -> str:
    """Blue and orange, which people who cannot tell red from green can; faint enough for the text on them."""
    lines = []
    for shade in range(1, SHADES + 1):
        strength = 0.45 * shade / SHADES
        lines.append(f".p{shade} {{ background: rgb(40 110 200 / {strength:.3f}) }}")
        lines.append(f".n{shade} {{ background: rgb(235 130 20 / {strength:.3f}) }}")
    return "\n".join(lines)


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _number(value: Any) -> str:
    known = _known(value)
    if known is None:
        return "—"
    return str(value) if isinstance(value, int) else f"{known:.4g}"
