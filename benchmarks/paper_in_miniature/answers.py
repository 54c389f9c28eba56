"""One run asked: answers to the held-out prompts, and the held-out pairs by one measure for all methods. A process of its own.

    python -m paper_in_miniature.answers SETTINGS.json --seed 0 --run RUN --out FILE      # without --run: the base model

What a pair is worth is the summed log-ratio to the base model, whatever the run's own loss takes it to be, and without the control texts
of CSFT, which would give the label away. Answers are asked for as the run's own method does: under CSFT behind the text for good ones.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paper_in_miniature.methods import Settings
from upo_cli.progress import reporting

from upo.backend import Sampling, choose, get_backend
from upo.config import load_config
from upo.data.control import Control
from upo.data.load import load_data
from upo.data.tokenizer import load_tokenizer
from upo.evaluation.answers import sample
from upo.evaluation.goals import questions_of
from upo.evaluation.heldout import HeldOut
from upo.evaluation.target import target_of_model, target_of_run
from upo.models import resolve
from upo.training.files import write_text
from upo.training.reporter import Reporter

BATCH = 96  # answers at once


def ask(settings: Settings, run: Path | None, seed: int, reporter: Reporter) -> dict[str, Any]:
    """What the answers file holds: numbers and margins of the held-out pairs, and per prompt the dataset's chosen answer and the sampled ones."""
    changes: dict[str, Any] = {"backend": settings.backend, "data": {"train": settings.heldout}, "objective": {"preference": {"loss": "dpo"}}}
    if run is None:
        config = target_of_model(settings.model, None, {**changes, "dtype": settings.dtype, "train": {"max_length": settings.max_length}}).config
        control_texts = None
    else:
        config = target_of_run(run, "latest", changes, reporter).config
        control_texts = load_config(run / "config.yaml").data.control
    tokenizer = load_tokenizer(resolve(config.model, config.revision))
    rows = load_data(config, tokenizer, reporter).train
    learner = get_backend(config.backend).load(config)
    numbers, by_pair = HeldOut.of(config, learner, choose(config.backend), rows, reporter).metrics(learner)
    chosen = {row.prompt_text: row.texts[0] for row in reversed(rows)}
    asked = questions_of(rows, settings.prompts, Control.of(control_texts, tokenizer))
    sampling = Sampling(settings.max_tokens, seed=seed, batch_size=BATCH)
    answers = sample(learner, tokenizer, [question.tokens for question in asked], settings.samples, sampling, reporter, "answers")
    return {
        "run": None if run is None else str(run),
        "seed": seed,
        "backend": choose(config.backend),
        "device": learner.info.device,
        "dtype": learner.info.dtype,
        "settings": asdict(settings),
        "numbers": numbers,
        "margins": [0.0] * len(rows) if run is None else by_pair["margin"].tolist(),  # the base model over itself, whatever rounding makes of it
        "samples": [{"prompt": q.text, "chosen": chosen[q.text], "answers": texts} for q, texts in zip(asked, answers, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings(**json.loads(options.settings.read_text(encoding="utf-8"))["settings"])
    with reporting(quiet=False) as reporter:
        result = ask(settings, options.run, options.seed, reporter)
    write_text(options.out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
