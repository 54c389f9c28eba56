"""`upo convert`: adapters between PEFT, mlx-lm and upo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from upo_cli.options import echo_json, json_option, quiet_option


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["peft", "mlx", "upo"]), required=True, help="Format to write. upo: what a run can start from (adapter.start).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--base", metavar="MODEL", help="Hub id or folder of the base model: checks shapes; needed where embeddings, head or experts are adapted.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Round the weights to this.  [default: every bit stays]")
@click.option("--verify", is_flag=True, help="Compare logits on a text, computed by the stock loaders of both formats.")
@json_option
@quiet_option
def convert(source: Path, to: str, out: Path, base: str | None, dtype: str | None, verify: bool, as_json: bool, quiet: bool) -> None:
    """Convert the adapter in SOURCE: a PEFT or mlx-lm adapter, a upo run or one of its checkpoints.

    scale * B * A is compared for every module before anything is written. What the other format cannot hold is refused by name.

    \b
    Examples:
      upo convert runs/first --to mlx --out first-mlx
      upo convert adapters --to peft --out for-vllm --base mistralai/Mistral-7B-v0.3 --verify
    """
    from upo.convert.run import convert as run
    from upo_cli.progress import reporting

    with reporting(quiet) as reporter:
        result = run(source, to, out, base, dtype, verify)
        for note in result.notes:
            reporter.info(note)
    if as_json:
        return echo_json(asdict(result))
    what = f"{result.modules} modules, rank {result.rank}, {'/'.join(result.dtypes)}"
    click.echo(f"{result.out}: {result.target_format} adapter ({what}); scale * B * A differs by {result.difference:.2g} at most")
    if result.verdict is not None:
        v = result.verdict
        click.echo(f"logits over {v.tokens} tokens differ by {v.adapted:.2g} at most (without adapter {v.base:.2g}); the adapter moves them by {v.effect:.2g}")
