"""`upo merge`: adapter + base model -> a full model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from upo_cli.options import echo_json, json_option, quiet_option


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--base", metavar="MODEL", help="Hub id or folder of the base model.  [default: the one the run or adapter names]")
@click.option("--to", type=click.Choice(["hf", "mlx"]), default="hf", show_default=True, help="hf: for transformers, vLLM, llama.cpp and mlx-lm. mlx: as mlx-lm writes it.")
@click.option("--bits", type=click.Choice(["4", "8"]), help="Quantise for mlx-lm to this many bits, with --to mlx.")
@json_option
@quiet_option
def merge(source: Path, out: Path, base: str | None, to: str, bits: str | None, as_json: bool, quiet: bool) -> None:
    """Merge the adapter in SOURCE into its base model: a PEFT or mlx-lm adapter, a upo run or one of its checkpoints.

    Computed in float32 and rounded once to the base's dtype. Tokenizer, chat template and generation config go along.

    \b
    Examples:
      upo merge runs/first --out first-merged
      upo merge runs/first --out first-4bit --to mlx --bits 4
      upo merge adapters --base mistralai/Mistral-7B-v0.3 --out merged
    """
    from upo.convert.merge import merge as run
    from upo_cli.progress import reporting

    if bits is not None and to != "mlx":
        raise click.UsageError("--bits quantises for mlx-lm: add --to mlx.")
    with reporting(quiet) as reporter:
        result = run(source, out, base, to, None if bits is None else int(bits))
        for note in result.notes:
            reporter.info(note)
        for warning in result.warnings:
            reporter.warn(warning)
    if as_json:
        return echo_json(asdict(result))
    what = f"{result.bits} bits" if result.bits else result.dtype
    size = f"{result.size / 1e9:.1f} GB" if result.size >= 1e8 else f"{result.size / 1e6:.1f} MB"
    click.echo(f"{result.out}: {result.layout} model, {size}, {what}; {result.modules} modules merged")
    if result.rounding:
        click.echo(f"rounding to {result.dtype} took {result.rounding:.1%} of the size of the adapter's change")
