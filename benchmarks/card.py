"""A CUDA card without internet: models of random weights and made-up rows, upo against TRL in the same run.

    python benchmarks/card.py --out runs/card --shapes 135m 1b 8b

Times do not depend on what the weights are. TRL must be installed: in this environment, or in the one of --trl-python. Model flops
utilisation (MFU) counts what the step needs at least, the same for all contenders: each prompt once, the head for completion tokens alone,
a forward and a backward pass of the policy whose weights are frozen, and a forward pass of the reference.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from contenders.make_model import words
from harness import lineup
from harness.peers import header
from harness.runs import CONTENDERS, Contender, Failed, Pythons, Run, interleaved, same_tokens
from harness.tables import of_runs, ratios, table
from harness.work import Work, made_pairs, prepare

from upo.errors import UpoError

SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=512, tie_word_embeddings=True),
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    "360m": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    "1.7b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32, head_dim=64, vocab_size=49152, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}  # dense bfloat16


def step_flops(shape: Mapping[str, int | bool], rows: Sequence[tuple[int, int, int]]) -> float:
    """Floating-point operations that DPO with a frozen base needs for these (prompt, chosen, rejected) lengths, reference included.

    A product with a weight of n numbers is 2 n operations a token, forward, and as many backward, as the frozen weight has no gradient;
    attention is 4 operations per number of the heads and token looked at, forward, and twice that backward. LoRA's own are left out.
    """
    hidden, heads, layers = (int(shape[name]) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    wide, kv = heads * int(shape["head_dim"]), int(shape["num_key_value_heads"]) * int(shape["head_dim"])
    weights = layers * (hidden * (2 * wide + 2 * kv) + 3 * hidden * int(shape["intermediate_size"]))
    linear = head = attention = 0.0
    for prompt, chosen, rejected in rows:
        linear += 2.0 * weights * (prompt + chosen + rejected)
        head += 2.0 * hidden * int(shape["vocab_size"]) * (chosen + rejected)
        pairs = looked_at(0, prompt) + looked_at(prompt, chosen) + looked_at(prompt, rejected)
        attention += 4.0 * layers * wide * pairs
    return 3 * (linear + head) + 4 * attention


def looked_at(before: int, tokens: int) -> int:
    """Tokens that `tokens` causal ones look at, themselves included, with `before` tokens in front."""
    return tokens * before + tokens * (tokens + 1) // 2


def card_lengths(count: int, max_length: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Lengths like those of chat data: prompts from a twelfth to a half of the largest length, completions from an eighth to a half."""
    draw = random.Random(seed)
    share = lambda low, high: max(2, int(max_length * draw.uniform(low, high)))  # noqa: E731
    return [(share(1 / 12, 1 / 2), share(1 / 8, 1 / 2), share(1 / 8, 1 / 2)) for _ in range(count)]


def contenders(options: argparse.Namespace) -> list[Contender]:
    return [lineup.upo("torch", "bfloat16"), *(() if options.without_trl else (lineup.TRL_DEFAULT, *lineup.TRL_FAST[:2]))]


def steady(run: Run) -> float:
    """Pairs per second with the reference pass, the first step, which warms up, left out."""
    steps = run.steps_s[1:] or run.steps_s
    return run.rows / len(run.steps_s) / (statistics.median(steps) + (run.reference_s - run.reference_in_steps_s) / len(run.steps_s))


def one_shape(name: str, options: argparse.Namespace) -> str:
    """Markdown for a shape; its model is made and, unless kept, removed again."""
    folder, model = options.out / name, (options.models or options.out) / f"model-{name}"
    if not (model / "config.json").exists():
        print(f"+ model {name} into {model}", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, str(CONTENDERS / "make_model.py"), str(model), json.dumps(SHAPES[name])], check=False).returncode != 0:
            raise Failed(f"model {name} could not be made in {model}")
    lengths = card_lengths(options.rows, options.max_length)
    work: Work = prepare(folder / "work", made_pairs(lengths, words()), model, batch_size=options.batch_size, max_length=options.max_length)
    runs: dict[str, list[Run]] = {}
    missing = []
    for contender in contenders(options):  # the runs alternate; a contender that fails (memory, mostly) is named and left out
        try:
            runs |= interleaved([contender], work, folder, Pythons({"upo": sys.executable, "trl": options.trl_python}), 1)
        except Failed as error:
            missing.append(f"\n- {error}")
    for repeat in range(2, options.repeats + 1):
        done = [c for c in contenders(options) if c.name in runs]
        runs = interleaved(done, work, folder, Pythons({"upo": sys.executable, "trl": options.trl_python}), repeat)
    every = [run for name in runs for run in runs[name]]
    same_tokens(every)
    peak, card = peak_tflops(options.peak_tflops)
    needed = step_flops(SHAPES[name], lengths) / len(lengths)
    best = runs[next(iter(runs))]
    lines = []
    for contender, found in runs.items():
        mfu = f"{statistics.median(steady(run) for run in found) * needed / (peak * 1e12):.1%}" if peak else "–"
        ours = ratios(best, found, steady) if found is not best else ""
        lines.append((contender, of_runs(found, steady), mfu, of_runs(found, lambda r: r.peak_memory_gb), of_runs(found, lambda r: r.first_step_s, ".1f"), ours, ratios(best, found, lambda r: r.peak_memory_gb) if ours else ""))
    columns = (name, "pairs/s", "MFU", "GB", "start to end of first step, s", "first line / this: pairs/s", "memory")
    tokens = every[0].tokens
    text = f"## {name}\n\nCard: {card}. {header(every)}\n{options.rows} pairs in steps of {options.batch_size}, {tokens['prompt']:,} prompt and {tokens['completion']:,} completion tokens in all, "
    return text + f"at least {needed / 1e12:.3g} TFLOP a pair; LoRA rank {work.rank} on all linear layers, DPO.\n\n{table(columns, lines)}" + "".join(missing) + "\n"


def peak_tflops(given: float | None) -> tuple[float | None, str]:
    """The card's peak in bfloat16, and its name."""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return given, "none (CPU)"
    return given or next((peak for name, peak in PEAK_TFLOPS.items() if name in asked), None), asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and table")
    parser.add_argument("--models", type=Path, help="folder for the models, 16 GB for 8b; default: --out")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["135m", "1b", "8b"])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with trl")
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of the card in bfloat16, where its name does not say")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.shapes:
        text = one_shape(name, options)
        (options.out / f"{name}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (Failed, UpoError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
