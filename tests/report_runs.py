"""Run folders written by hand, with figures that the tests know, and what a page shows of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from upo.config import load_config

HOSTILE = 'The </script><script>alert(1)</script> <img src=x onerror=alert(2)> & "quotes" \u202egnp.exe {{ 7*7 }} \ud800 end'
HASH = "ab" * 32
UPO: dict[str, Any] = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "readability", "weight": 0.7}, {"scorer": "length", "weight": -0.3}]}}


def make_run(folder: Path, *, steps: int = 20, done: int | None = None, objective: Any = None, evaluation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A run of `steps` steps of which `done` are done (all: finished). Losses are 1/step; held-out accuracy goes from 0.5 to 0.75."""
    done = steps if done is None else done
    folder.mkdir(parents=True)
    sections: dict[str, Any] = {"model": "owner/base", "data": {"train": "/home/someone/secret client/train.jsonl", "eval": "/home/someone/held.jsonl"}, "train": {"steps": steps}}
    (folder / "config.yaml").write_text(load_config({**sections, "objective": objective or UPO, **config}).dump(), encoding="utf-8")
    finished = done == steps
    session = {"backend": "torch", "device": "cpu", "dtype": "float32", "ranks": 1, "from_step": 0, "to_step": done if finished else None, "versions": {"upo": "0.1.0", "torch": "2.0"}}
    manifest = {
        "upo": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "identity": {"data.train": HASH, "data.eval": HASH[::-1], "model": "0123456789abcdef"},
        "data": {"train": {"source": "/home/someone/secret client/train.jsonl", "rows": 120, "completions": 240}, "eval": {"source": "/home/someone/held.jsonl", "rows": 60, "completions": 120}},
        "model": {"name": "owner/base", "parameters": 1, "trainable": 1, "targets": ["q_proj"]},
        "reference": {"spec": "base", "keys": {}},
        "steps": steps,
        "sessions": [session],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines: list[dict[str, Any]] = [{"step": 0, "eval": True, "loss": 1.0, "accuracy": 0.5}]
    lines += [{"step": s, "loss": 1 / s, "accuracy": 0.5, "lr": 0.1, "peak_memory_gb": 1.5, "seconds": 2.0, "tokens_per_s": 50.0} for s in range(1, done + 1)]
    (folder / "checkpoints").mkdir()
    if finished:
        lines.append({"step": steps, "eval": True, "loss": 0.25, "accuracy": 0.75})
        summary = {"rows": 80, "steps": steps, "reference_s": 4.0, "train_s": 40.0, "total_s": 130.0, "rows_per_s": 1.25, "tokens_per_s": 1234.5, "shared_tokens": 0.256, "mfu": None, "eval": {"before": lines[0], "after": lines[-1]}}
        (folder / "summary.json").write_text(json.dumps({**summary, "warnings": ["/home/someone/secret client/train.jsonl:7: 3 rows dropped."]}))
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": "/home/someone/models/base"}))
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


def measured(change: tuple[float, float, float] = (0.12, 0.05, 0.19), **more: Any) -> dict[str, Any]:
    """What `upo eval` writes: readability 0.2 -> 0.32 with this change, length 0.5 -> 0.45 with an interval that includes 0."""
    interval = dict(zip(("mean", "low", "high"), change, strict=True))
    return {
        "run": "runs/x", "step": 20, "prompts": 9, "samples_per_prompt": 2, "rows": 60,
        "accuracy": {"before": 0.5, "after": 0.75, "change": {"mean": 0.25, "low": 0.1, "high": 0.4}},
        "goals": {
            "readability": {"weight": 0.7, "before": 0.2, "after": 0.32, "change": interval},
            "length": {"weight": -0.3, "before": 0.5, "after": 0.45, "change": {"mean": -0.05, "low": -0.11, "high": 0.01}},
        },
        "answers": {"words": {"before": 30.25, "after": 22.0}, "empty": {"before": 0, "after": 1}},
        "win_rate": {"judge": "readability", "mean": 0.55, "low": 0.45, "high": 0.65, "wins": 5, "ties": 1, "losses": 4},
        "samples": [{"prompt": f"Question {i}?", "before": [f"before {i}", "other"], "after": [f"after {i}", "other"]} for i in range(9)],
        **more,
    }  # fmt: skip


class Page(HTMLParser):
    """What is in a page: tags with attributes, text, and the text under each id."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style = "", ""
        self.ids: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag in ("td", "th", "br", "p", "div", "li"):
            self.handle_data(" ")
        if tag not in ("meta", "br", "link", "img"):
            self._open.append((tag, given.get("id")))
            if given.get("id"):
                self.ids[str(given["id"])] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if any(tag == "style" for tag, _ in self._open):
            self.style += data
            return
        self.text += data
        for _, name in self._open:
            if name:
                self.ids[name] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self, name: str | None = None) -> str:
        """The text under an id, or all of it, with single blanks."""
        return " ".join((self.text if name is None else self.ids[name]).split())
