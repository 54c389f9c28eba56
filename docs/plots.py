"""Small pictures of the losses, drawn from the losses themselves: value and slope against the margin of one pair. SVG, no dependency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from upo import svg
from upo.losses import LOSSES
from upo.losses.base import Loss, Scores
from upo.numpy_ops import ops

TOKENS, START = 50, -100.0  # each completion's length, and its log-prob at a margin of 0
WIDTH, HEIGHT, GAP, COLUMNS = 220, 140, 52, 3


def one_pair(margin: float, loss: Loss) -> Scores:
    """A pair whose chosen completion has gained margin / 2 nats over the reference and whose rejected one has lost as many."""
    logp, both = START + np.array([margin, -margin]) / 2, np.full(2, START)
    owner = np.repeat([0, 1], TOKENS)
    state = {"steps": 2.0, "spread_steps": 2.0, "mean": 0.0, "deviation": 0.1, "sum": 0.0, "count": 2.0}
    return Scores(
        logp=logp, length=np.full(2, float(TOKENS)), label=np.array([1.0, -1.0]), chosen=np.array([0]), rejected=np.array([1]),
        positive=np.array([0]), negative=np.array([1]), owner=np.zeros(2, int), groups=1,
        count={"pair": 1, "completion": 2, "chosen": 1, "group": 1, "token": 2 * TOKENS, "chosen_token": TOKENS},
        ref_logp=both, ref_logps=np.stack([both, both + np.array([5.0, -5.0])]), partner_logratio=np.zeros(2), reward=np.array([1.0, 0.0]), value=np.full(2, 0.5),
        token_logp=logp[owner] / TOKENS, token_owner=owner, token_index=np.tile(np.arange(float(TOKENS)), 2), ref_token_logp=both[owner] / TOKENS,
        token_value=np.full(2 * TOKENS, 0.5), collision=np.full(2, -80.0), anchor_logp=np.array([START]), anchor_ref_logp=np.array([START]),
        distance=np.zeros((1, 1)), quantile=np.array([1.0, 0.25]), ref_rewards=np.full(2, 4.0),
        columns={"epsilon": np.full(2, 0.2), "margin": np.full(2, 1.0), "win_probability": np.array([0.8, 0.2])},
        state={name: state[name] for name in loss.initial_state()},
    )  # fmt: skip


def curve(loss: Loss, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loss at each margin, and its slope by central differences."""
    value: Callable[[float], float] = lambda d: float(np.mean(loss(ops, one_pair(d, loss))))  # noqa: E731
    step = 1e-4 * float(margins[-1])
    return np.array([value(d) for d in margins]), np.array([(value(d + step) - value(d - step)) / (2 * step) for d in margins])


def picture(names: Sequence[str]) -> str:
    """An SVG with one panel for each of these losses: the loss solid, its slope dashed, each scaled to its own range."""
    rows = -(-len(names) // COLUMNS)
    width, height = COLUMNS * (WIDTH + 2 * GAP), rows * (HEIGHT + GAP) + GAP // 2
    parts = ["", svg.element("rect", width=width, height=height, fill="#ffffff")]
    for i, name in enumerate(names):
        x, y = GAP + (i % COLUMNS) * (WIDTH + 2 * GAP), GAP // 2 + (i // COLUMNS) * (HEIGHT + GAP)
        parts.append(_panel(LOSSES[name](), x, y))
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return svg.element("svg", "\n".join([*parts, ""]), xmlns="http://www.w3.org/2000/svg", **size, font_family="sans-serif", font_size=11) + "\n"


def _panel(loss: Loss, x: int, y: int) -> str:
    span = 400.0 if 0 < getattr(loss, "beta", 1.0) <= 0.01 else 50.0
    margins = np.linspace(-span, span, 121)
    lines = [
        "",
        svg.text(loss.name, x=WIDTH / 2, y=-8, text_anchor="middle", font_weight="bold", fill="#222222"),
        svg.element("rect", width=WIDTH, height=HEIGHT, fill="#f6f7f9"),
        svg.element("line", x1=WIDTH / 2, x2=WIDTH / 2, y1=0, y2=HEIGHT, stroke="#c8ccd4"),
    ]
    value, slope = curve(loss, margins)
    solid, dashed = {"stroke": "#0b5fa5", "stroke_width": 2}, {"stroke": "#b3541e", "stroke_width": 1.5, "stroke_dasharray": "4 3"}
    for numbers, style, side, anchor in ((value, solid, -4, "end"), (slope, dashed, WIDTH + 4, "start")):
        low, high = float(numbers.min()), float(numbers.max())
        scaled = (numbers - low) / (high - low) if high - low > 1e-9 else np.full_like(numbers, 0.5)
        lines.append(svg.polyline(WIDTH * np.arange(121) / 120, HEIGHT * (0.95 - 0.9 * scaled), fill="none", **style))
        lines.append(svg.text(f"{high:.3g}", x=side, y=12, text_anchor=anchor, fill=style["stroke"]))
        lines.append(svg.text(f"{low:.3g}", x=side, y=HEIGHT - 3, text_anchor=anchor, fill=style["stroke"]))
    for at, words in ((0.0, f"{-span:g}"), (WIDTH / 2, "0"), (float(WIDTH), f"{span:g}")):
        lines.append(svg.text(words, x=at, y=HEIGHT + 13, text_anchor="middle", fill="#555555"))
    return svg.element("g", "\n".join([*lines, ""]), transform=f"translate({x},{y})")
