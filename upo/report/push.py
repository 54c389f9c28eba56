"""`upo push`: the adapter of a run, its card and its configuration to the model hub; nothing else, and nothing before it is asked for."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upo.errors import RunError
from upo.report import facts
from upo.report.card import base_model, card
from upo.report.plain import clean
from upo.report.read import Told, read_run

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
METRICS = ("metrics.jsonl",)


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, or was."""

    repo: str
    private: bool
    files: dict[str, int]  # name in the repository -> bytes
    card: str
    written: bool  # whether the card is the README.md of the run's folder, which the user may have edited
    url: str | None  # of the commit; None for a dry run


def push(
    folder: Path, repo: str, *, upload: bool = False, public: bool = False, base: str | None = None, license: str | None = None, metrics: bool = False
) -> Upload:
    """Gather the files and, with `upload`, send them to `repo` (owner/name), which is made private unless `public`.

    The token is huggingface_hub's own (`hf auth login`, HF_TOKEN). Raises RunError in one line for a run without a result, a base without
    a hub id, a repository that is public without `public`, and whatever the hub refuses.
    """
    run = read_run(folder)
    _check_repo(repo)
    name = base_model(run, base)
    if name is None:
        raise RunError(f"{folder}: the base model is a folder ({facts.model_name(run)}), which nobody else has. Name it on the hub: --base owner/name")
    with _staged(run, name, license, metrics) as stage:
        files = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
        text = (stage / "README.md").read_text(encoding="utf-8")
        url = _send(stage, repo, public, run.name) if upload else None
    return Upload(repo, not public, files, text, (folder / "README.md").is_file(), url)


@contextmanager
def _staged(run: Told, base: str, license: str | None, metrics: bool) -> Iterator[Path]:
    """A temporary folder with exactly what goes up, without any path of this machine."""
    source = run.path / "adapter"
    for path in (source, *(source / name for name in ADAPTER)):
        if path.is_symlink() or not path.exists():
            unfinished = "" if run.finished else f" {run.notes[0]}"
            raise RunError(f"{path}: {'is a link, which is not followed' if path.is_symlink() else 'missing; there is no result to upload'}.{unfinished}")
    with tempfile.TemporaryDirectory(prefix="upo-push-") as temporary:
        stage = Path(temporary)
        shutil.copyfile(source / ADAPTER[1], stage / ADAPTER[1])
        try:
            config = json.loads((source / ADAPTER[0]).read_text(encoding="utf-8"))
            assert isinstance(config, dict)
        except (ValueError, RecursionError, AssertionError):
            raise RunError(f"{source / ADAPTER[0]}: not a JSON object; the adapter cannot be used as it is.") from None
        (stage / ADAPTER[0]).write_text(json.dumps({**facts.walk(config, facts.portable(run)), "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")
        (stage / "config.yaml").write_text(facts.config_yaml(run, base), encoding="utf-8")
        readme = run.path / "README.md"
        if readme.is_symlink():
            raise RunError(f"{readme}: is a link, which is not followed.")
        text = readme.read_text(encoding="utf-8") if readme.is_file() else card(run, base, license)
        (stage / "README.md").write_text(text, encoding="utf-8")
        for name in METRICS if metrics else ():
            if (run.path / name).is_symlink() or not (run.path / name).is_file():
                raise RunError(f"{run.path / name}: no such file. Leave --metrics out.")
            shutil.copyfile(run.path / name, stage / name)
        yield stage


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RunError(f"{repo}: not a name for a repository (owner/name): {str(error).splitlines()[0]}") from None
    if repo.count("/") != 1:
        raise RunError(f"{repo}: name owner and repository: owner/name")


def _send(stage: Path, repo: str, public: bool, name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api: Any = HfApi()
    try:
        if api.repo_exists(repo):
            if not api.repo_info(repo).private and not public:
                raise RunError(f"{repo}: exists and is public. Add --public to upload there, or name another repository.")
        else:
            api.create_repo(repo, private=not public)
        done = api.upload_folder(repo_id=repo, folder_path=str(stage), commit_message=f"Adapter of the run {name}, by upo")
    except LocalTokenNotFoundError:
        raise RunError(f"{repo}: not logged in to the hub. Log in with `hf auth login`, or set HF_TOKEN.") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = "Log in with `hf auth login` as somebody who may write there." if status in (401, 403) else "Try again."
        raise RunError(f"{repo}: the hub refused ({_line(error)}). {remedy} Files that had gone up stay out of sight until the commit.") from None
    except RunError:
        raise
    except Exception as error:  # no connection, in whichever way the HTTP library of the day says so; offline mode; what the hub's library checks itself
        raise RunError(f"{repo}: could not be uploaded ({_line(error)}). Nothing was committed; try again with a connection.") from None
    return str(done)


def _line(error: Exception) -> str:
    return (clean(str(error)).strip().splitlines() or [type(error).__name__])[0][:200]
