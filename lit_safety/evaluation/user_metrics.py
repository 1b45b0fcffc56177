"""metrics.json of an evaluation for users: shares by arm and split, differences to the base, and wins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_safety.data.categories import CATEGORIES
from lit_safety.evaluation.judges import JudgeError
from lit_safety.evaluation.user_answers import FIGURES, answers
from lit_safety.evaluation.user_intervals import paired_share, share
from lit_safety.evaluation.user_run import BASE, OURS
from lit_safety.evaluation.user_wins import KINDS, choose, comparable, ours_first, outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.evaluation.judges import Judge, Verdict
    from lit_safety.evaluation.user_answers import Answers
    from lit_safety.evaluation.user_rows import UserRow
    from lit_safety.evaluation.user_run import UserResults
    from lit_safety.evaluation.user_wins import Outcome

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
        return {"pass_harmless": answer}
    return {"pass_rate": answer, f"pass_{row.part}": answer}


def _outcome(row: UserRow, ours: Verdict | JudgeError, theirs: Verdict | JudgeError, seed: int) -> Outcome | JudgeError:
    first = ours_first(row, seed)
    return outcome(choose(row, *((ours, theirs) if first else (theirs, ours))), first)


def _figures(rows: Sequence[UserRow], given: dict[str, list[Answers]]) -> dict[str, Any]:
    """Shares of every arm by split, those of one category too, and their paired differences to the base."""
    arms: dict[str, Any] = {name: {} for name in given}
    changes: dict[str, Any] = {name: {} for name in given if name != BASE}
    for split, places in parts_of(rows).items():
        for name, own in given.items():
            arms[name][split] = _shares(rows, own, places)
            by_category = {
                category: _shares(rows, own, [i for i in places if rows[i].prompt.category == category], BY_CATEGORY)
                for category in CATEGORIES
            }
            arms[name][split]["by_category"] = {category: found for category, found in by_category.items() if found}
            if name != BASE:
                changes[name][split] = _differences(rows, given[BASE], own, places)
    return {"arms": arms, "differences": changes}


def _shares(
    rows: Sequence[UserRow], own: Sequence[Answers], places: Sequence[int], figures: Sequence[str] = tuple(FIGURES)
) -> dict[str, Any]:
    found = {}
    for figure in figures:
        asked = [i for i in places if figure in own[i]]
        if asked:
            found[figure] = share([own[i][figure] for i in asked], [_user(rows[i]) for i in asked]).describe()
    return found


def _differences(
    rows: Sequence[UserRow], base: Sequence[Answers], own: Sequence[Answers], places: Sequence[int]
) -> dict[str, Any]:
    found = {}
    for figure in FIGURES:
        asked = [i for i in places if figure in own[i]]
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
        for split, places in parts_of(rows).items():
            kinds = {}
            for part, kind in KINDS.items():
                asked = [i for i in places if rows[i].part == part and outcomes[i] is not None]
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
