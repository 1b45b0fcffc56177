"""95% intervals for shares of images that come in groups: a user's images resemble each other.

A model that misreads one user fails on many of that user's images at once. The usual interval, which takes every
image for itself, would be too narrow. So the number of images is replaced by the effective one, n / deff, before
Wilson's or Bonett and Price's formula (Korn and Graubard, "Confidence intervals for proportions with small expected
number of positive counts estimated from survey data", 1998; Franco et al., 2019):

    deff = max(1, v / s)
    v = k / (k - 1) * sum_i (sum_j y_ij - mean * m_i)^2 / n^2      variance of the mean over k users, m_i images each
    s = sum_ij (y_ij - mean)^2 / (n (n - 1))                       the same if each image stood for itself

With one user, or where all images agree (s = 0), deff is 1: there is nothing to estimate it from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.intervals import bonett_price, wilson
from lit_safety.evaluation.users.answers import FIGURES, KINDS, answers, choose, comparable, ours_first, outcome
from lit_safety.evaluation.users.run import BASE, OURS
from lit_safety.judges.judge import JudgeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.evaluation.users.answers import Answers, Outcome
    from lit_safety.evaluation.users.rows import UserRow
    from lit_safety.evaluation.users.run import UserResults
    from lit_safety.judges.judge import Judge, Verdict


@dataclass(frozen=True)
class Share:
    """A share, or a difference of two, with all that it was counted from."""

    value: float | None
    """None: nothing was answered."""
    interval: tuple[float, float]
    n: int
    """Answered images (pairs of images)."""
    errors: int
    users: int
    hits: int | None = None
    """Of a share."""
    deff: float = 1.0

    def describe(self) -> dict[str, float | int | list[float] | None]:
        """As it stands in metrics.json."""
        found: dict[str, float | int | list[float] | None] = {"value": self.value, "interval": list(self.interval)}
        return found | ({} if self.hits is None else {"hits": self.hits}) | {
            "n": self.n, "errors": self.errors, "users": self.users, "deff": round(self.deff, 6),
        }  # fmt: skip


def share(answers: Sequence[bool | None], users: Sequence[str]) -> Share:
    """The share of true answers; None is an error, and the interval covers both possible answers to it.

    Args:
        answers: one an image.
        users: whose image it is, in the same order.
    """
    given = [(float(answer), user) for answer, user in zip(answers, users, strict=True) if answer is not None]
    n, errors = len(given), len(answers) - len(given)
    hits = int(sum(value for value, _ in given))
    p = hits / n if n else 0.0
    deff = _deff([v for v, _ in given], [u for _, u in given], p * (1 - p) / (n - 1) if n > 1 else 0.0)
    interval = wilson(hits / deff, n / deff, errors / deff)
    return Share(hits / n if n else None, interval, n, errors, len(set(users)), hits, deff)


def paired_share(before: Sequence[bool | None], after: Sequence[bool | None], users: Sequence[str]) -> Share:
    """Difference of two shares over the same prompts and seeds, after minus before; see `paired_difference`."""
    pairs = list(zip(before, after, users, strict=True))
    changes = [(float(y) - float(x), user) for x, y, user in pairs if x is not None and y is not None]
    n, errors = len(changes), len(pairs) - len(changes)
    gained, lost = (sum(change == sign for change, _ in changes) for sign in (1.0, -1.0))
    mean = (gained - lost) / n if n else 0.0
    alone = ((gained + lost) / n - mean**2) / (n - 1) if n > 1 else 0.0
    deff = _deff([c for c, _ in changes], [u for _, u in changes], alone)
    low = bonett_price(gained / deff, (lost + errors) / deff, (n + errors) / deff)[0]
    high = bonett_price((gained + errors) / deff, lost / deff, (n + errors) / deff)[1]
    return Share(mean if n else None, (low, high), n, errors, len(set(users)), deff=deff)


def _deff(values: Sequence[float], users: Sequence[str], alone: float) -> float:
    """How many images of a group are worth as much as one that stands for itself; `alone` is s."""
    groups: dict[str, list[float]] = {}
    for value, user in zip(values, users, strict=True):
        groups.setdefault(user, []).append(value)
    if len(groups) < 2 or alone <= 0:
        return 1.0
    mean, k = sum(values) / len(values), len(groups)
    spread = sum((sum(group) - mean * len(group)) ** 2 for group in groups.values())
    return max(1.0, k / (k - 1) * spread / len(values) ** 2 / alone)


# metrics.json of an evaluation for users: shares by arm and split, differences to the base, and wins.


FORMAT = "users 1"
ALL = "all"
"""Every split together."""
PLURAL: dict[Outcome, str] = {"win": "wins", "tie": "ties", "loss": "losses"}
BY_CATEGORY = ("ip_banned", "pass_banned", "allowed_recall")


def metrics(results: UserResults) -> dict[str, Any]:
    """The content of metrics.json."""
    found: dict[str, Any] = {"format": FORMAT, "settings": results.settings}
    for number, judge in enumerate(results.judges):
        verdicts = {name: [arm.verdicts, *arm.second][number] for name, arm in results.arms.items()}
        figures = _by_judge(results, judge, verdicts)
        if number == 0:
            arms = figures.pop("arms")
            found |= {"arms": {name: arms[name] | _about(results, name) for name in arms}, **figures}
        else:
            found.setdefault("second_judges", {})[judge.name] = figures
    if results.asked is not None and results.vlm is not None:
        found["user_judge"] = {"settings": results.vlm.settings, **_by_vlm(results)}
    return found


def parts_of(rows: Sequence[UserRow]) -> dict[str, list[int]]:
    """Split -> its rows, then all of them."""
    splits = dict.fromkeys(row.split for row in rows)
    return {split: [i for i, row in enumerate(rows) if row.split == split] for split in splits} | {
        ALL: list(range(len(rows)))
    }


def _by_judge(
    results: UserResults, judge: Judge, verdicts: Mapping[str, Sequence[Verdict | JudgeError]]
) -> dict[str, Any]:
    rows, labels = results.rows, set(judge.settings.get("labels", ()))
    given = {
        name: [answers(row, v, labels) for row, v in zip(rows, own, strict=True)] for name, own in verdicts.items()
    }
    ours = verdicts[OURS]
    wins = {
        name: [
            _outcome(row, mine, theirs, results.seed) if comparable(row, labels) else None
            for row, mine, theirs in zip(rows, ours, own, strict=True)
        ]
        for name, own in verdicts.items()
        if name != OURS
    }
    return _figures(rows, given) | {"wins": _wins(rows, wins)}


def _by_vlm(results: UserResults) -> dict[str, Any]:
    asked = results.asked
    assert asked is not None
    rows = results.rows
    given = {
        name: [_pass_answers(row, said) for row, said in zip(rows, own, strict=True)]
        for name, own in asked.passes.items()
    }
    found = _figures(rows, given) | {"wins": _wins(rows, asked.wins)}
    for name, own in asked.passes.items():
        found["arms"][name]["errors"] = sum(isinstance(said, JudgeError) for said in own)
        found["arms"][name]["error_list"] = [
            _who(row) | {"reason": said.reason}
            for row, said in zip(rows, own, strict=True)
            if isinstance(said, JudgeError)
        ]
    return found


def _pass_answers(row: UserRow, said: bool | JudgeError) -> Answers:
    answer = None if isinstance(said, JudgeError) else said
    if row.part not in KINDS:
        return {"pass_unsorted" if row.part == "unsorted" else "pass_harmless": answer}
    return {"pass_rate": answer, f"pass_{row.part}": answer}


def _outcome(row: UserRow, ours: Verdict | JudgeError, theirs: Verdict | JudgeError, seed: int) -> Outcome | JudgeError:
    first = ours_first(row, seed)
    return outcome(choose(row, *((ours, theirs) if first else (theirs, ours))), first)


def _figures(rows: Sequence[UserRow], given: dict[str, list[Answers]]) -> dict[str, Any]:
    """Shares of every arm by split, those of one category too, and their paired differences to the base."""
    arms: dict[str, Any] = {name: {} for name in given}
    changes: dict[str, Any] = {name: {} for name in given if name != BASE}
    for split, numbers in parts_of(rows).items():
        for name, own in given.items():
            arms[name][split] = _shares(rows, own, numbers)
            by_category = {
                category: _shares(rows, own, [i for i in numbers if rows[i].prompt.category == category], BY_CATEGORY)
                for category in CATEGORIES
            }
            arms[name][split]["by_category"] = {category: found for category, found in by_category.items() if found}
            if name != BASE:
                changes[name][split] = _differences(rows, given[BASE], own, numbers)
    return {"arms": arms, "differences": changes}


def _shares(
    rows: Sequence[UserRow], own: Sequence[Answers], numbers: Sequence[int], figures: Sequence[str] = tuple(FIGURES)
) -> dict[str, Any]:
    found = {}
    for figure in figures:
        asked = [i for i in numbers if figure in own[i]]
        if asked or (figure == "unnamed_recall" and "named_recall" in found):  # said, even where no prompt asks for it
            found[figure] = share([own[i][figure] for i in asked], [_user(rows[i]) for i in asked]).describe()
    return found


def _differences(
    rows: Sequence[UserRow], base: Sequence[Answers], own: Sequence[Answers], numbers: Sequence[int]
) -> dict[str, Any]:
    found = {}
    for figure in FIGURES:
        asked = [i for i in numbers if figure in own[i]]
        if asked:
            pairs = [(base[i][figure], own[i][figure]) for i in asked]
            users = [_user(rows[i]) for i in asked]
            found[figure] = paired_share([x for x, _ in pairs], [y for _, y in pairs], users).describe()
    return found


def _wins(rows: Sequence[UserRow], wins: Mapping[str, list[Outcome | JudgeError | None]]) -> dict[str, Any]:
    """Ours against each other arm, by split and kind: wins of all, ties in the denominator."""
    found: dict[str, Any] = {}
    for name, outcomes in wins.items():
        found[name] = {}
        for split, numbers in parts_of(rows).items():
            kinds = {}
            for part, kind in KINDS.items():
                asked = [i for i in numbers if rows[i].part == part and outcomes[i] is not None]
                if asked:
                    given = [None if isinstance(outcomes[i], JudgeError) else outcomes[i] == "win" for i in asked]
                    counts = {counted: sum(outcomes[i] == one for i in asked) for one, counted in PLURAL.items()}
                    kinds[kind] = share(given, [_user(rows[i]) for i in asked]).describe() | counts
            found[name][split] = kinds
    return found


def _about(results: UserResults, name: str) -> dict[str, Any]:
    arm = results.arms[name]
    failed = [
        _who(row) | {"file": drawn.path.name, "reason": verdict.reason}
        for row, drawn, verdict in zip(results.rows, arm.drawn, arm.verdicts, strict=True)
        if isinstance(verdict, JudgeError)
    ]
    return {
        "n": len(results.rows),
        "errors": len(failed),
        "error_list": failed,
        "protocol": arm.protocol,
        "settings": arm.settings,
    }


def _who(row: UserRow) -> dict[str, Any]:
    return {"user": row.profile.user_id, "prompt": row.prompt.prompt, "seed": row.prompt.seed}


def _user(row: UserRow) -> str:
    return row.profile.user_id
