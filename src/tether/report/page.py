"""The page: one HTML file that loads nothing and runs nothing, readable in light and dark, on a phone and on paper.

Everything that comes from a run goes through `escape`; a content security policy forbids scripts and network besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tether.runs import StoredEpisode
from tether.runs.messages import prompt_text
from tether.runs.starts import without_secrets
from tether.uncertainty import NORMAL_95, rounded, with_error
from tether.yaml_file import dump_yaml

from .charts import Chart, Series, draw, number, thin, trailing_mean
from .run import RunData, Verdict, verdict
from .style import STYLE
from .text import escape, shorten

KL = {"kl": [("kl", "KL"), ("kl_k1", "by the drawn tokens, which the alarm reads")], "kl_k1": [("kl_k1", "KL")]}
ALARMS = {"kl": "KL", "length": "length", "entropy": "entropy", "gap": "score against gold"}
FRONTIER_POINTS = 60  # of the run's line; more would cover each other
PROMPT, RESPONSE = (120, 300), (900, 200)  # characters shown of the start and of the end


def page(data: RunData) -> str:
    """The whole document."""
    name = escape(data.folder.resolve().name)
    body = [
        _head(data),
        _verdict(verdict(data)) if "gold" in data.config else "",
        _tiles(data),
        _alarms(data),
        _frontier(data),
        _iterations(data),
        _samples(data),
        _configuration(data),
        f"<footer>Written by <code>tether report</code>, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. "
        "This file loads nothing and runs no scripts.</footer>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name} · Tether</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


# ---- what it was and how it stands -----------------------------------------------------------------------------------


def _head(data: RunData) -> str:
    config, done = data.config, int(data.rows[-1]["iteration"])
    planned = config.get("iterations")
    facts = [f"iteration {done}" + ("" if planned is None else f" of {planned}")]
    facts += [str(config[name]) for name in ("model", "env") if config.get(name)]
    for section in ("reward", "gold"):
        names = (config.get(section) or {}).get("functions") or []
        if section == "reward" and config.get("task"):
            names = [config["task"], *names]
        if names:
            facts.append(f"{section}: {', '.join(map(str, names))}")
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f"<header><h1>{escape(data.folder.resolve().name)}</h1><ul class=facts>{listed}</ul></header>"


def _verdict(found: Verdict) -> str:
    return (
        f'<section class="verdict {found.kind}"><p><strong>{escape(found.word)}</strong> '
        f"{escape(found.sentence)}</p></section>"
    )


def _tiles(data: RunData) -> str:
    names = [
        ("score", "score"),
        ("gold", "gold score"),
        (data.kl, "KL, nats per response"),
        ("response_length", "tokens per response"),
        ("episode_length", "steps per episode"),
        ("entropy", "entropy, nats per step"),
        ("distinct_responses", "distinct responses"),
        ("repeated_ngrams", "repeated 4-grams"),
    ]
    tiles = []
    for metric, label in names:
        values, now = data.column(metric)[1], data.now(metric)
        if now is None:
            continue
        unit, factor = (" %", 100) if metric in ("distinct_responses", "repeated_ngrams") else ("", 1)
        found = data.error(metric)
        error = None if found is None else factor * found
        last, first = (rounded(factor * value, error).replace("-", "−") + unit for value in (now, values[0]))
        beside = f"± {rounded(error, error)}, first: {first}" if error else f"first: {first}"
        tiles.append(f"<li><b>{last}</b><span>{label}</span><small>{beside}</small></li>")
    note = f"Means over the last {min(data.window, len(data.rows))} iterations, ± their standard error."
    return f"<section><ul class=tiles>{''.join(tiles)}</ul><p class=note>{note}</p></section>"


def _alarms(data: RunData) -> str:
    if data.thresholds is None:
        return ""
    if not data.alarms:
        return "<section><h2>Alarms</h2><p class=note>None was raised.</p></section>"
    rows = []
    for alarm in data.alarms:
        if alarm.state == "raised":
            ended = next(
                (a for a in data.alarms if a.state == "cleared" and a.kind == alarm.kind and a.since == alarm.since),
                None,
            )
            until = "to now" if ended is None else f"to {ended.iteration}"
            state = "on" if ended is None else "off"
            when = f"<span class=when>iteration {alarm.since} {until}</span>"
            seen = f"<p>{escape(alarm.seen[:1].upper() + alarm.seen[1:])}.</p>"
            remedy = f"<p class=note>To do: {escape(alarm.remedy)}.</p>"
            rows.append(f'<li class="{state}"><b>{ALARMS[alarm.kind]}</b> {when}{seen}{remedy}</li>')
    return f"<section><h2>Alarms</h2><ul class=alarms>{''.join(rows)}</ul></section>"


# ---- the frontier ----------------------------------------------------------------------------------------------------


def _frontier(data: RunData) -> str:
    if not data.column(data.kl)[1]:
        return ""
    gold = data.start("gold") is not None and data.start("score") is not None
    series = []
    for colour, name in enumerate(["score", "gold"] if gold else ["score"], start=1):
        scale = (data.start(name) or (0.0, 1.0)) if gold else (0.0, 1.0)
        label = "gold score" if name == "gold" else "score"
        series += _best_of_n(data, name, label, colour, scale) + _path(data, name, label, colour, scale)
    if not series:
        return ""
    y_name = "standard deviations above the start" if gold else "score"
    shown = sorted((s for s in series if len(s.x) > 1 or not s.dashed), key=lambda s: s.dashed)
    legend = _legend([(s.colour, s.dashed, s.name) for s in shown], "legend")
    drawn = [
        f'<div class="{kind}">'
        + draw(Chart("score against KL", series, "KL to the reference, nats per response", y_name, *size, root=True))
        + "</div>"
        for kind, size in (("wide", (860, 430)), ("narrow", (370, 330)))
    ]
    said = (
        "Each point is a mean over iterations of the run, which starts at the left. The further right, the further the "
        "policy is from the reference."
    )
    if gold:
        said += " Lines that part, the score going up and the gold score down, are a reward that is being fooled."
    if data.frontier is None:
        said += " Best-of-n of the reference was not drawn: --frontier.samples 16 does."
    else:
        said += (
            f" Dashed: the best of n responses of the reference by the score (n up to {data.frontier['samples']}, "
            f"{data.frontier['prompts']} prompts; band: 95 %), at the KL log n − (n − 1)/n."
        )
    return f"<section class=whole><h2>Score against KL</h2>{legend}{''.join(drawn)}<p class=note>{said}</p></section>"


def _path(data: RunData, name: str, label: str, colour: int, scale: tuple[float, float]) -> list[Series]:
    rows = [row for row in data.rows if all(isinstance(row.get(key), int | float) for key in (data.kl, name))]
    if not rows:
        return []
    window = data.window
    kls = trailing_mean([max(0.0, float(row[data.kl])) for row in rows], window)
    values = trailing_mean([float(row[name]) for row in rows], window)
    numbers = [float(row["iteration"]) for row in rows]
    _, xs = thin(numbers, kls, FRONTIER_POINTS)
    numbers, ys = thin(numbers, values, FRONTIER_POINTS)
    notes = [f"iteration {i:.0f}: {number(y)} at {number(x)} nats" for i, x, y in zip(numbers, xs, ys, strict=True)]
    scaled = [(y - scale[0]) / scale[1] for y in ys]
    return [Series(f"PPO, {label}", xs, scaled, colour, points=True, notes=notes)]


def _best_of_n(data: RunData, name: str, label: str, colour: int, scale: tuple[float, float]) -> list[Series]:
    curve: list[dict[str, Any]] = [] if data.frontier is None else data.frontier["curve"]
    if not curve or name not in curve[0]:
        return []
    means = [point[name] for point in curve]
    errors = [NORMAL_95 * (point.get(f"{name}_standard_error") or 0.0) for point in curve]
    notes = [
        f"n = {p['n']}: {with_error(p[name], e).replace('-', '−')} at {number(p['kl'])} nats"
        for p, e in zip(curve, errors, strict=True)
    ]
    powers = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024}
    return [
        Series(
            f"best of n, {label}",
            [point["kl"] for point in curve],
            [(mean - scale[0]) / scale[1] for mean in means],
            colour,
            dashed=True,
            low=[(mean - error - scale[0]) / scale[1] for mean, error in zip(means, errors, strict=True)],
            high=[(mean + error - scale[0]) / scale[1] for mean, error in zip(means, errors, strict=True)],
            notes=notes,
            labels=[str(p["n"]) if p["n"] in powers and colour == 1 else "" for p in curve],
        )
    ]


def _legend(entries: Sequence[tuple[int, bool, str]], kind: str) -> str:
    items = [
        f'<li><i class="c{colour}{" dashed" if dashed else ""}"></i>{escape(name)}</li>'
        for colour, dashed, name in entries
    ]
    return f'<ul class="{kind}">{"".join(items)}</ul>'


# ---- over the iterations ---------------------------------------------------------------------------------------------


def _iterations(data: RunData) -> str:
    parts = sorted({name for row in data.rows for name in row if name.startswith(("score/", "gold/"))})
    groups: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
        (
            "What it earns",
            [
                ("score", "what the reward gave", [("score", "score")]),
                ("gold", "held out, never trained on", [("gold", "gold score")]),
                ("reward", "with all penalties", [("reward", "reward")]),
                *[(name, "before its weight", [(name, name)]) for name in parts],
            ],
        ),
        (
            "What it costs",
            [
                ("KL", "to the reference, nats per response", KL[data.kl]),
                ("length", "tokens per response", [("response_length", "mean")]),
                ("length", "steps per episode", [("episode_length", "mean")]),
                ("entropy", "nats per step", [("entropy", "entropy")]),
                ("variety", "shares", [("distinct_responses", "distinct"), ("repeated_ngrams", "repeated 4-grams")]),
                ("ended by itself", "share of responses", [("eos_share", "share")]),
            ],
        ),
        (
            "How it learns",
            [
                ("clip fraction", "share of steps", [("clip_fraction", "clip fraction")]),
                ("update size", "KL per step", [("approx_kl", "KL")]),
                ("explained variance", "of the critic", [("explained_variance", "explained variance")]),
                ("β", "of the KL penalty", [("beta", "β")]),
            ],
        ),
    ]
    sections = []
    for heading, charts in groups:
        drawn = [_panel(data, *chart) for chart in charts]
        if any(drawn):
            sections.append(f"<section><h2>{heading}</h2><div class=grid>{''.join(drawn)}</div></section>")
    return "\n".join(sections)


def _panel(data: RunData, title: str, unit: str, metrics: list[tuple[str, str]]) -> str:
    series = []
    for colour, (metric, name) in enumerate(metrics, start=1):
        xs, ys = data.column(metric)
        if not xs or (metric == "beta" and len(set(ys)) == 1):  # a fixed β stands in the configuration
            continue
        xs, ys = thin(xs, ys)
        notes = [f"iteration {x:.0f}: {number(y)}" for x, y in zip(xs, ys, strict=True)]
        series.append(Series(name, xs, ys, colour + (metric.startswith("gold")), notes=notes))
    if not series:
        return ""
    thresholds, levels = data.thresholds, []
    if thresholds is not None and metrics[0][0] in (data.kl, "entropy"):
        level = thresholds.kl if metrics[0][0] == data.kl else thresholds.entropy
        levels = [] if level is None else [(level, f"alarm at {level:g}")]
    kinds = {data.kl: "kl", "response_length": "length", "entropy": "entropy", "gold": "gap"}
    marks = [
        (float(alarm.iteration), f"alarm in iteration {alarm.iteration}: {alarm.message}")
        for alarm in data.alarms
        if alarm.state == "raised" and alarm.kind == kinds.get(metrics[0][0])
    ]
    legend = _legend([(s.colour, False, s.name) for s in series], "legend small") if len(series) > 1 else ""
    last = " / ".join(number(values[-1]) for values in (data.column(metric)[1] for metric, _ in metrics) if values)
    chart = draw(Chart(f"{title} over iterations", series, "iteration", levels=levels, marks=marks))
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span><em>{last}</em></figcaption>"
        f"{legend}{chart}</figure>"
    )


# ---- samples ---------------------------------------------------------------------------------------------------------


def _samples(data: RunData) -> str:
    if not data.last:
        return "<section><h2>Samples</h2><p class=note>The run's folder holds no episodes.</p></section>"
    parts = []
    names = {"best": "Best score", "worst": "Worst score", "most kl": "Most KL"}
    for kind, episodes in data.samples.items():
        cards = "".join(_card(episode, prompt=True, tokens=kind == "most kl") for episode in episodes)
        note = ""
        if kind == "most kl":
            note = (
                "<p class=note>Shaded: tokens that the policy likes more (<i class=up>orange</i>) or less "
                "(<i class=down>blue</i>) than the reference does, by nats; point at one to see how many.</p>"
            )
        parts.append(f"<h3>{names[kind]}, iteration {data.last}</h3>{note}<div class=cards>{cards}</div>")
    if data.revisited:
        pairs = "".join(
            f"<div class=pair>{_prompt(first)}<div class=cards>{_card(first)}{_card(last)}</div></div>"
            for first, last in data.revisited
        )
        parts.append(f"<h3>The same prompt, first and last</h3>{pairs}")
    return f"<section><h2>Samples</h2>{''.join(parts)}</section>"


def _prompt(episode: StoredEpisode) -> str:
    text = prompt_text(episode.messages or episode.prompt.strip())
    return f"<pre class=prompt>{escape(shorten(text, *PROMPT))}</pre>"


def _card(episode: StoredEpisode, prompt: bool = False, tokens: bool = False) -> str:
    facts = [f"score {number(episode.score)}"]
    gold = episode.details.get("gold")
    if isinstance(gold, int | float):
        facts.append(f"gold {number(gold)}")
    if episode.kl is not None:
        facts.append(f"KL {episode.kl:.2f}".replace("-", "−"))
    facts.append(f"{episode.length} steps" + (", cut off" if episode.truncated else ""))
    response = _shaded(episode) if tokens else escape(shorten(episode.response, *RESPONSE))
    return (
        f"<article>{_prompt(episode) if prompt else ''}<pre>{response or '<i class=note>(empty)</i>'}</pre>"
        f"<p class=note>iteration {episode.iteration} · {' · '.join(facts)}</p></article>"
    )


def _shaded(episode: StoredEpisode) -> str:
    """The response token by token, each shaded by log π − log π_ref."""
    assert episode.reference_log_probs is not None
    limit, spans = 400, []
    for action, own, reference in list(
        zip(episode.actions, episode.log_probs, episode.reference_log_probs, strict=True)
    )[:limit]:
        gap = own - reference
        strength = min(4, int(abs(gap) / 0.5 + 0.5))  # 0 below a quarter of a nat, 4 from 1.75 nats on
        kind = f"{'up' if gap > 0 else 'down'}{strength}" if strength else ""
        title = f"{gap:+.2f} nats"
        spans.append(f'<span class="{kind}" title="{title}">{escape(action)}</span>')
    left_out = len(episode.actions) - limit
    return "".join(spans) + (f" […{left_out:,} tokens…]" if left_out > 0 else "")


# ---- configuration ---------------------------------------------------------------------------------------------------


def _configuration(data: RunData) -> str:
    return (
        "<section><h2>Configuration</h2><details><summary>every setting of the run</summary>"
        f"<pre>{escape(without_secrets(dump_yaml(data.config)))}</pre></details></section>"
    )
