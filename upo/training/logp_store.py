"""Log-probs on disk, by the text they belong to: what any run has scored serves every later one that scores the same in the same way."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from upo.cache import cache_root
from upo.data.forest import Forest, Tokens

KEY = 16  # bytes of a text's key


def text_keys(forest: Forest, *, tokens: bool, alone: bool) -> list[bytes]:
    """A key for each completion with its prompt, and for what is kept of it: a sum, or a number for each of its tokens.

    `alone`: whatever it was computed beside. Otherwise the key names every token of the forest, as it does where log-probs depend on that.
    """
    prompts = [_digest(p) for p in forest.prompts]
    texts = [prompts[int(p)] + _digest(c) for p, c in zip(forest.owner, forest.completions, strict=True)]
    beside = b"" if alone else hashlib.sha256(b"".join([*prompts, *texts])).digest()
    return [hashlib.sha256(text + beside + (b"tokens" if tokens else b"")).digest()[:KEY] for text in texts]


def _digest(tokens: Tokens) -> bytes:
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).digest()


class Store:
    """Everything scored by one model in one way (`name`, hexadecimal): files that are written at once and never changed.

    A file's name is the SHA-256 of its content, so a damaged one does not count. Any number of processes may add to a store.
    """

    def __init__(self, name: str) -> None:
        self.folder = cache_root() / "reference" / name

    def read(self, wanted: Collection[bytes]) -> dict[bytes, np.ndarray]:
        """What is there of these keys: one float32 number, or one per token."""
        found: dict[bytes, np.ndarray] = {}
        wanted = frozenset(wanted)
        for path in sorted(self.folder.glob("*.npz")) if wanted else ():
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != path.stem:
                    continue
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    keys, counts, values = (arrays[name] for name in ("keys", "counts", "values"))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # gone since, or not a file of ours
                continue
            for key, part in zip(keys, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                if (name := key.tobytes()) in wanted:
                    found[name] = part
        return found

    def add(self, entries: Mapping[bytes, np.ndarray]) -> None:
        """Keep these, in a file of their own."""
        if not entries:
            return
        keys = np.frombuffer(b"".join(entries), np.uint8).reshape(-1, KEY)
        buffer = io.BytesIO()
        values = list(entries.values())
        np.savez(buffer, keys=keys, counts=np.array([len(v) for v in values], np.int64), values=np.concatenate(values).astype("<f4"))
        content = buffer.getvalue()
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, self.folder / f"{hashlib.sha256(content).hexdigest()}.npz")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
