"""Scoring many answers: each distinct one once, in batches, in parallel, with progress; what is done is kept at once, so that a run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from upo.data.notes import plural
from upo.errors import DataError, UpoError
from upo.rewards.cache import RewardCache
from upo.training.reporter import Reporter

if TYPE_CHECKING:
    from upo.rewards.base import Answer, Ready, TextScorer

SPOTS = 3  # answers that are scored a second time
SAME = 1e-6  # relative to the score; a scorer that rounds differently from call to call cannot be told from one that wavers


def score_texts(scorer: TextScorer, answers: Sequence[Answer], reporter: Reporter) -> list[float]:
    """One finite number per answer, from the cache where it has it.

    Raises UpoError or DataError, which names the row; they say how many scores are kept on disk for the next time.
    """
    keys = [scorer.digest(answer) for answer in answers]
    distinct = dict(zip(keys, answers, strict=True))
    cache = RewardCache(scorer.name, scorer.identity(), reporter) if scorer.remembered else None
    known = cache.read(distinct) if cache else {}
    if len(known) < len(distinct):
        if cache is None:
            known = _score(scorer, distinct, None, reporter)
        else:
            with cache.alone():  # of several ranks one scores, and the others find the scores here
                known = cache.read(distinct)
                todo = {key: answer for key, answer in distinct.items() if key not in known}
                known.update(_score(scorer, todo, cache, reporter) if todo else {})
    return [known[key] for key in keys]


def _score(scorer: TextScorer, todo: dict[bytes, Answer], cache: RewardCache | None, reporter: Reporter) -> dict[bytes, float]:
    found: dict[bytes, float] = {}
    reporter.start(f"score {scorer.title}", len(todo), "answers")
    keys = list(todo)
    batches = [keys[i : i + scorer.batch] for i in range(0, len(keys), scorer.batch)]

    def kept() -> str:
        if not found or cache is None or cache.path is None:
            return ""
        return f" {len(found):,} of {len(todo):,} scores are kept; the same command goes on from there."

    try:
        with scorer.ready(len(todo), reporter) as ready:
            for i, values in _run(ready, [[todo[key] for key in batch] for batch in batches]):
                new = dict(zip(batches[i], checked(scorer.title, values, [todo[key] for key in batches[i]]), strict=True))
                if cache:
                    cache.write(new)
                found.update(new)
                reporter.advance(len(new))
            if scorer.spot_check:
                _spot_check(scorer, ready, todo, found, reporter)
    except UpoError as error:
        raise type(error)(f"{error}{kept()}") from error
    except KeyboardInterrupt:
        if kept():
            reporter.warn(f"Scorer {scorer.title}:{kept()}")
        raise
    return found


def _run(ready: Ready, batches: Sequence[Sequence[Answer]]) -> Iterator[tuple[int, Any]]:
    """(index, scores) of each batch as it is done. When one fails, those under way are still delivered, then its error is raised."""
    if ready.parallel == 1:
        yield from ((i, ready.score(batch)) for i, batch in enumerate(batches))
        return
    pool = ThreadPoolExecutor(ready.parallel)
    try:
        futures = {pool.submit(ready.score, batch): i for i, batch in enumerate(batches)}
        failure: BaseException | None = None
        for future in as_completed(futures):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                yield futures[future], future.result()
            elif failure is None:
                failure = error
                for other in futures:
                    other.cancel()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def checked(label: str, values: Any, answers: Sequence[Answer]) -> list[float]:
    """The values as one finite float per answer. Raises UpoError, or DataError naming the row, where they are not."""
    try:
        values = list(values)
    except TypeError:
        raise UpoError(f"scorer {label}: returned {type(values).__name__} instead of a list of numbers.") from None
    if len(values) != len(answers):
        raise UpoError(f"scorer {label}: returned {plural(len(values), 'number')} for {plural(len(answers), 'completion')}. It must return one for each, in order.")
    numbers = []
    for value, answer in zip(values, answers, strict=True):
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{answer.origin}: scorer {label} returned {str(value)[:40]!r}, which is not a number.") from None
        if not math.isfinite(number):
            raise DataError(f"{answer.origin}: scorer {label} returned {number}. Every completion needs a finite reward.")
        numbers.append(number)
    return numbers


def _spot_check(scorer: TextScorer, ready: Ready, todo: dict[bytes, Answer], found: dict[bytes, float], reporter: Reporter) -> None:
    """Score a few answers again, in other company, and warn where the score is another."""
    keys = list(todo)[:: max(1, len(todo) // SPOTS)][:SPOTS]
    again = [checked(scorer.title, ready.score([todo[key]]), [todo[key]])[0] for key in keys]
    changed = [(key, now) for key, now in zip(keys, again, strict=True) if abs(now - found[key]) > SAME * max(1.0, abs(found[key]))]
    if changed:
        key, now = changed[0]
        reporter.warn(
            f"Scorer {scorer.title} gives the same answer different scores ({todo[key].origin}: {found[key]:.4g}, then {now:.4g}; "
            f"{len(changed)} of {len(keys)} asked again). The first are used; make it independent of chance and of what else is scored."
        )
