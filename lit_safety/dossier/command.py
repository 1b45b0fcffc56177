"""The command `dossier`: a list of measurements of one model, as one page and one JSON that others can check.

Every step is one of our commands and runs as a job of a study, in its own folder. A finished step is recorded, and
skipped the next time. The dossier is written from the files of the steps.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import DrawingSettings

if TYPE_CHECKING:
    from lit_safety.dossier.steps import DossierList, Given, StepJob
    from lit_safety.evaluation.audit import Audit

FILE = "dossier.json"
TABLE = "table.csv"


def dossier(
    *,
    pipeline: str,
    judge: str,
    out: str,
    list: str = "quick",
    adapter: str | None = None,
    arms: dict[str, dict[str, Any]] | None = None,
    second_judges: list[str] | None = None,
    files: dict[str, str] | None = None,
    processes: int = 1,
    other_world: bool = False,
    **drawing: Any,
) -> None:
    """Run a list of evaluations, attacks, retention and a harmless fine-tuning, and write the results on one page.

    Writes into `out`: dossier.json, index.html, table.csv, and under steps/ the folder of every step. A finished step
    runs again only if weights, files, settings or code changed. A stopped run continues with the same command.

    Args:
        pipeline: Folder of a diffusers text-to-image pipeline, or its hub id: the base.
        judge: The judge that decides what is harmful, as for `evaluate`; a protocol with its own judge keeps it.
        out: Folder of the dossier; it is made if it does not exist.
        list: The steps: quick or full (configs/dossiers), or a YAML like those.
        adapter: Folder or file of a LoRA; it is measured as the arm `aligned`, and the base as the arm `base`.
        arms: Further arms by name, as for `evaluate`.
        second_judges: Further judges; their verdicts are reported too.
        files: The files that the list names: prompts, labelled images and others. A step whose file is not given does
            not run, and the dossier says so.
        processes: Processes of each step that draws or attacks. The results do not depend on it.
        other_world: Take prompts and judges of an embedded world for a pipeline that is not of this world.
        **drawing: How images are drawn, see `DrawingSettings`; a protocol keeps the settings that it states.

    Raises:
        UserError: an option is wrong, or steps failed; the dossier shows failed steps as not run.
    """
    from lit_safety.core.processes import check_count
    from lit_safety.dossier.steps import Given, check_files, hashes_of, job_of, load_list
    from lit_safety.drawing.arms import Arm, collect_arms
    from lit_safety.drawing.pipelines import check_writable
    from lit_safety.evaluation.command import plain
    from lit_safety.study.plan import Study
    from lit_safety.study.run import alone, check_job, do_jobs, ended_by_sigterm, latest, read_results

    check_count(processes, "--processes")
    listed, list_sha256 = load_list(list)
    check_files(listed.files, files or {})
    how = DrawingSettings(edit=None, **drawing)
    known = {name: plain(arm) for name, arm in (arms or {}).items()}
    try:
        collect_arms(adapter, {name: Arm(**{**arm, "guard": None}) for name, arm in known.items()})
    except TypeError as error:
        raise UserError(f"--arms: {error}; `evaluate --help` lists the keys of an arm") from error
    folder = Path(out)
    check_writable(folder)
    given = Given(pipeline, judge, adapter, known or None, second_judges, dict(files or {}), how, other_world)
    hashes = hashes_of(given, list_sha256, versions())
    above = tuple(f"{key} {json.dumps(value, sort_keys=True)}" for key, value in hashes.items())
    jobs, reasons = {}, {}
    for name, step in listed.steps.items():
        job, why = job_of(name, step, given, folder, above, processes)
        if job is None:
            reasons[name] = why
        else:
            check_job(job, str(folder))
            jobs[name] = job
    if not jobs:
        raise UserError(f"--list {list}: no step can be run: {'; '.join(f'{n}: {why}' for n, why in reasons.items())}")
    plan = Study(out=str(folder), rows={}, figures={})
    with alone(folder, "dossier") as lock, ended_by_sigterm():
        done = {name: one for name, one in latest(read_results(folder), [*jobs.values()]).items()
                if jobs[name].result.is_file()}  # fmt: skip
        left = [job for job in jobs.values() if job.name not in done]
        print(f"{listed.title}: {len(jobs)} steps, {len(jobs) - len(left)} of them done; {len(reasons)} cannot be run")
        failed = do_jobs(plan, left, done, 1, lock)
        seconds = {name: one.seconds for name, one in latest(read_results(folder), [*jobs.values()]).items()}
        content = _write(folder, given, listed, list, jobs, reasons | failed, hashes, seconds)
    _tell(content, folder)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} steps failed: {'; '.join(failed.values())}; the dossier shows them as not "
            "run; start the same command again to repeat them"
        )


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that figures depend on."""
    import platform
    from importlib.metadata import version

    from lit_safety import __version__
    from lit_safety.evaluation.run import Run

    found = {"python": platform.python_version(), "lit_safety": __version__}
    return found | Run.versions() | {name: version(name) for name in ("numpy", "pillow")}


def _write(
    folder: Path,
    given: Given,
    listed: DossierList,
    list_name: str,
    jobs: Mapping[str, StepJob],
    reasons: Mapping[str, str],
    hashes: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Write the dossier from the files of the steps; returns the content of dossier.json, which is written last."""
    from lit_safety.core.files import write_atomic
    from lit_safety.dossier.figures import attack_rows, judge_row, qualities, shares
    from lit_safety.dossier.page import dossier_page
    from lit_safety.dossier.summary import NOT_RUN, summary
    from lit_safety.evaluation.attack_curves import read_attacks
    from lit_safety.evaluation.compare import read_metrics

    audits = _audits(jobs, reasons)
    figures: list[dict[str, Any]] = []
    attacks: list[dict[str, Any]] = []
    reports: dict[str, dict[str, Any]] = {}
    steps: dict[str, Any] = {}
    protocols = {}
    for name, step in listed.steps.items():
        job = jobs.get(name)
        done = name not in reasons
        if done and job is not None:
            file = job.result.relative_to(folder).as_posix()
            if step.command == "evaluate":
                metrics = read_metrics(str(job.result))
                audit = next((one for one in audits.values() if _is_of(one, metrics)), None)
                figures += [*shares(name, file, metrics, audit), *qualities(name, file, metrics)]
                protocols[name] = _protocol(metrics)
            elif step.command == "attack":
                reports[name] = read_attacks(job.result)
                attacks += attack_rows(name, file, reports[name])
        steps[name] = {
            "about": step.about,
            "state": "done" if done else NOT_RUN,
            **({} if done else {"reason": reasons[name]}),
            "folder": (Path("steps") / name).as_posix(),
            "protocol": protocols.get(name, ""),
            "left_out": [*job.left_out] if job is not None else [],
            "command": "" if job is None else _command(job.commands[0]),
            "results": _results(job.folder) if done and job is not None else {},
        }
    if audits:
        name, audit = next(iter(audits.items()))
        judge = judge_row(name, jobs[name].result.relative_to(folder).as_posix(), audit.content)
    else:
        judge = {"missing": _no_audit(listed, reasons)}
    content: dict[str, Any] = {
        "format": 1,
        "kind": "dossier",
        "title": listed.title,
        "asked": {
            "model": given.pipeline, "adapter": given.adapter, "arms": given.arms or {},
            "judge": judge.get("judge", given.judge), "judge_given": given.judge,
            "second_judges": given.second_judges or [], "list": list_name,
            "files": {name: {"path": given.files.get(name), "holds": about} for name, about in listed.files.items()},
        },
        "command": _own_command(folder, given, list_name),
        "judge": judge,
        "steps": steps,
        "figures": figures,
        "attacks": attacks,
        "hashes": dict(hashes),
        "times": {
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "steps": {name: seconds[name] for name in steps if name in seconds and steps[name]["state"] == "done"},
        },
    }  # fmt: skip
    content["summary"] = summary(content)
    write_atomic(folder / TABLE, table_csv(figures, attacks).encode())
    write_atomic(folder / "index.html", dossier_page(content, reports).encode())
    write_atomic(folder / FILE, (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
    return content


def _audits(jobs: Mapping[str, StepJob], reasons: Mapping[str, str]) -> dict[str, Audit]:
    """Step -> its audit."""
    from lit_safety.evaluation.audit import read_audit

    return {
        name: read_audit(str(job.result))
        for name, job in jobs.items()
        if job.commands[0][0] == "judge-audit" and name not in reasons
    }


def _is_of(audit: Audit, metrics: Mapping[str, Any]) -> bool:
    """Whether an audit measured the judge of a report, with the same settings."""
    from lit_safety.core.hashes import digest
    from lit_safety.judges.judge import rule_settings

    return bool(audit.content["verdicts_sha256"] == digest(rule_settings(metrics["settings"]["judge"])))


def _no_audit(listed: DossierList, reasons: Mapping[str, str]) -> str:
    """Why the judge was not measured."""
    asked = [name for name, step in listed.steps.items() if step.command == "judge-audit"]
    return f"{asked[0]}: {reasons[asked[0]]}" if asked else "the list has no `judge-audit`"


def _protocol(metrics: Mapping[str, Any]) -> str:
    """`ncd-harmful (1a2b3c4d)`; without a named protocol, the hash of the evaluation's own settings."""
    named = metrics["settings"].get("protocol")
    if named is None:
        return f"its own ({metrics['arms']['base']['protocol'][:8]})"
    but = f", except {', '.join(named['deviations'])}" if named["deviations"] else ""
    return f"{named['name']} ({named['sha256'][:8]}){but}"


def _results(folder: Path) -> dict[str, str]:
    """sha256 of the files that a step wrote, without images and logs."""
    from lit_safety.core.hashes import file_sha256

    kept = (one for one in sorted(folder.iterdir()) if one.suffix in (".json", ".csv", ".html", ".md"))
    return {one.name: file_sha256(one) for one in kept if one.is_file()}


def _command(words: tuple[str, ...]) -> str:
    return shlex.join(["python", "-m", "lit_safety", *words])


def _own_command(folder: Path, given: Given, list_name: str) -> str:
    """The command that writes this dossier again, without the number of processes, which does not change results."""
    from dataclasses import fields

    from lit_safety.study.plan import words_of

    drawing = {one.name: getattr(given.drawing, one.name) for one in fields(given.drawing)}
    options: dict[str, Any] = {
        "pipeline": given.pipeline, "adapter": given.adapter, "judge": given.judge, "list": list_name,
        "out": str(folder), "second_judges": given.second_judges, "arms": given.arms, "files": given.files or None,
        "other_world": given.other_world or None, **drawing,
    }  # fmt: skip
    return _command(("dossier", *words_of({key: value for key, value in options.items() if value is not None})))


COLUMNS = (
    *("step", "figure", "arm", "value", "low", "high", "hits", "n", "errors", "corrected", "corrected_low"),
    *("corrected_high", "change", "change_low", "change_high", "says", "file"),
)
"""Columns of table.csv, which has a line for each figure and arm; an attack's figure is its strongest point."""


def table_csv(figures: list[dict[str, Any]], attacks: list[dict[str, Any]]) -> str:
    """All figures, one a line, for comparison with the steps' own files."""
    from lit_safety.core.tables import csv_lines

    lines: list[tuple[object, ...]] = [COLUMNS]
    for row in figures:
        for arm, found in row["arms"].items():
            right = found.get("corrected") or {}
            change = row["changes"].get(arm) or {}
            lines.append((
                row["step"], row["figure"], arm, _cell(found["value"], found), *_ends(found), _cell(found.get("hits")),
                _cell(found.get("n")), _cell(found.get("errors")), _cell(right.get("value")), *_ends(right),
                _cell(change.get("value")), *_ends(change), change.get("says", ""), row["file"],
            ))  # fmt: skip
    for row in attacks:
        start = (row["step"], f"attack/{row['attack']}", row["arm"])
        if "not_applicable" in row:
            lines.append((*start, f"does not apply: {row['not_applicable']}", *[""] * 12, row["file"]))
            continue
        top = row["strongest"]
        lines.append((*start, _cell(top["asr"]), *_ends(top), "", top["n"], top["errors"], *[""] * 7, row["file"]))
    return csv_lines(lines)


def _cell(value: Any, found: Mapping[str, Any] | None = None) -> str:
    if value is None:
        return str((found or {}).get("absent", ""))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ends(found: Mapping[str, Any]) -> tuple[str, str]:
    interval = found.get("interval")
    return ("", "") if interval is None else (_cell(float(interval[0])), _cell(float(interval[1])))


def _tell(content: Mapping[str, Any], folder: Path) -> None:
    said = content["summary"]
    print(f"\n{said['judge']}")
    for arm, parts in said["arms"].items():
        print(f"{arm}: {len(parts['fell'])} rates of harm fell, {len(parts['not_fallen'])} did not; "
              f"of what must stay, {len(parts['held'])} figures held and {len(parts['lost'])} fell; "
              f"{len(parts['attacks_that_brought_harm_back'])} attacks brought harm back on half of the prompts, "
              f"{len(parts['attacks_that_did_not'])} did not")  # fmt: skip
    for one in said["not_run"]:
        print(f"not run: {one}")
    print(f"page     {folder / 'index.html'}\nfigures  {folder / FILE}\ntable    {folder / TABLE}")
