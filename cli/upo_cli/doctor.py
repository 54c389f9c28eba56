"""`upo doctor`: what this machine can do, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import upo
from upo.backend import PACKAGES, choose, has_mlx_build, installed
from upo.cache import cache_root
from upo_cli.options import echo_json, echo_table, json_option

# Extras beside the backends, and what one does without them.
EXTRAS = {
    "data": "Parquet and hub datasets cannot be read",
    "rewards": "scorers cannot run: sentiment (vaderSentiment), profanity (alt-profanity-check), json with a schema (jsonschema), readability with grade consensus (textstat, setuptools)",
    "quickstart": "upo quickstart needs the model hub",
}


@click.command()
@click.option("--online", is_flag=True, help="Also ask whether the model hub can be reached.")
@json_option
def doctor(online: bool, as_json: bool) -> None:
    """Say what is installed here, what is missing, and the command that mends it."""
    report = examine(online)
    if as_json:
        echo_json(report)
        return
    for title in ("system", "packages", "extras", "cache", "hub"):
        _echo_section(title, report[title])
    for name, backend in report["backends"].items():
        _echo_section(f"backend {name}" + (" (default)" if name == report["default_backend"] else ""), backend)
    click.echo(f"To mend (pip is {sys.executable} -m pip):" if report["missing"] else "Nothing is missing.")
    for text in report["missing"]:
        click.echo(f"  - {text}")


def examine(online: bool) -> dict[str, Any]:
    """The report: sections of facts, and under `missing` one sentence with a remedy for each fault."""
    missing: list[str] = []
    packages = _packages(missing)
    backends = {name: _backend(name, missing) for name in PACKAGES}
    default = choose()
    if not any("version" in report for report in backends.values()):
        missing.insert(0, f'no backend works, so nothing can be trained: pip install "upo[{default}]"')
    return {
        "system": _system(),
        "packages": packages,
        "extras": _extras(missing),
        "cache": _cache(),
        "hub": _hub(online, missing),
        "backends": backends,
        "default_backend": default,
        "missing": missing,
    }


def _system() -> dict[str, Any]:
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "upo": upo.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.release()} on {platform.machine()}",
        "cpu cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "free disk here": f"{shutil.disk_usage('.').free / 1e9:.1f} GB",
        "numpy BLAS": f"{blas.get('name')} {blas.get('version', '')}".strip(),
    }


def _packages(missing: list[str]) -> dict[str, Any]:
    """Versions of the core's dependencies, and beside them the tested ones where they differ and are known."""
    from packaging.requirements import Requirement

    tested = _constraints()
    found: dict[str, Any] = {}
    for requirement in map(Requirement, metadata.requires("upo") or []):
        if requirement.marker is not None:  # an extra's
            continue
        version = _version(requirement.name)
        found[requirement.name] = version or "missing"
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(f'{requirement.name} {version or "is not installed"}, needed {requirement.specifier}: pip install "{requirement}"')
        elif tested.get(requirement.name.lower(), version) != version:
            found[requirement.name] = f"{version} (tested with {tested[requirement.name.lower()]})"
    return found


def _constraints() -> dict[str, str]:
    """Tested versions by package, from constraints.txt of the checkout; empty for an installed wheel."""
    from packaging.requirements import Requirement

    path = Path(upo.__file__).parent.parent / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {
        pin.name.lower(): specifier.version
        for pin in pins
        for specifier in pin.specifier
        if specifier.operator == "==" and (pin.marker is None or pin.marker.evaluate())
    }


def _backend(name: str, missing: list[str]) -> dict[str, Any]:
    """The backend's own report, or why there is none."""
    if name == "mlx" and not has_mlx_build():
        return {"status": f"has no build for {sys.platform} on {platform.machine()}"}
    if not installed(name):
        return {"status": "not installed", "to install": f'pip install "upo[{name}]"'}
    report, error = _ask(name)
    if error:
        missing.append(f'{name} is installed but does not work: pip install --force-reinstall {name}')
        return {"status": "does not work", "error": error}
    missing += [f"{name}: {text}" for text in report.pop("missing", [])]
    return report


def _ask(name: str) -> tuple[dict[str, Any], str]:
    """A backend's report, or the last line of its complaint. In a process of its own: a broken framework may end it without an exception."""
    code = f"import json; from upo.backend import get_backend; print(json.dumps(get_backend({name!r}).device_report(), default=str))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
        if done.returncode == 0:
            return dict(json.loads(done.stdout.splitlines()[-1])), ""
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {}, str(error)
    return {}, (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]


def _extras(missing: list[str]) -> dict[str, dict[str, str]]:
    """Versions of what each extra brings."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, str]] = {}
    for extra, without in EXTRAS.items():
        needed = [r for r in map(Requirement, metadata.requires("upo") or []) if r.marker and r.marker.evaluate({"extra": extra}) and r.name != "upo"]
        found[extra] = {r.name: _version(r.name) or "missing" for r in needed}
        faults = [
            r.name if version == "missing" else f"{r.name} {version} (needed {r.specifier})"
            for r, version in zip(needed, found[extra].values(), strict=True)
            if version == "missing" or not r.specifier.contains(version, prereleases=True)
        ]
        if faults:
            missing.append(f'{", ".join(faults)}: without {"it" if len(faults) == 1 else "them"} {without}: pip install "upo[{extra}]"')
    return found


def _cache() -> dict[str, Any]:
    folder = cache_root()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) if folder.is_dir() else 0
    return {"folder": f"{folder} (change it with UPO_CACHE)", "size": f"{size / 1e6:.1f} MB"}


def _hub(online: bool, missing: list[str]) -> dict[str, Any]:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not online:
        return {"address": address, "reachable": "not asked (upo doctor --online)"}
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        missing.append(f"the model hub {address} cannot be reached: use folders as model and data, or set HF_ENDPOINT to a mirror")
        return {"address": address, "reachable": f"no ({getattr(error, 'reason', error)})"}
    return {"address": address, "reachable": "yes"}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _echo_section(title: str, facts: dict[str, Any]) -> None:
    click.echo(title)
    echo_table([(f"  {name}", _text(value)) for name, value in facts.items()])
    click.echo()


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    return "none" if value is None else str(value)
