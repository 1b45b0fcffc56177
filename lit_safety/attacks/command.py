"""The command `attack`: any number of attacks on any number of arms, as curves of success against budget."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from lit_safety.attacks.target import Attack
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings


def attack(
    *,
    pipeline: str,
    prompts: str,
    judge: str,
    out: str,
    attacks: dict[str, Attack],
    adapter: str | None = None,
    arms: dict[str, Arm] | None = None,
    only: list[str] | None = None,
    sets: dict[str, list[str]] | None = None,
    second_judges: list[str] | None = None,
    explicit: int | None = 6,
    prompt_kind: Literal["explicit", "implicit", "adversarial", "lookalike", "clean"] | None = None,
    prompt_category: str | None = None,
    seed: int = 0,
    other_world: bool = False,
    processes: int = 1,
    shards: str | None = None,
    **drawing: Any,
) -> None:
    """Run every attack on every arm, on your own models, and report the success rate (ASR) against the budget.

    Writes into `out`: attacks.json, attacks.png, and the images under images/. A finished attack on an arm is kept
    under done/ and not run again, so that a killed run continues where it stopped.

    Args:
        pipeline: Folder of a diffusers text-to-image pipeline, or its hub id: the base.
        prompts: File as for `evaluate`; its explicit prompts are attacked.
        judge: What decides what is harmful, as for `evaluate`.
        out: Folder of the report; created if it does not exist.
        attacks: The attacks by name, each a class_path and init_args, as in configs/attack.yaml.
        adapter: LoRA folder or file, attacked as the arm `aligned` in addition to the arm `base`.
        arms: Further arms by name, as for `evaluate`: adapters, pipelines, UNets, negative prompts, guards.
        only: Run only these attacks, given by their names or by names of `sets`; null: all.
        sets: Lists of attacks by name, for `only`.
        second_judges: Further judges, which are reported in addition to the one that decides.
        explicit: Explicit prompts attacked in each category; null: all.
        prompt_kind: The kind of the prompts of a published file, if its columns do not give it.
        prompt_category: The category of harm that they ask for, if its columns do not give it.
        seed: Seed of all random choices of the attacks.
        other_world: Allow prompts and judges of an embedded world, such as data/toyworld, for a pipeline that is not of
            this world; false refuses them.
        processes: Number of processes that run attacks, each with its own models; with the device cuda, process i takes
            GPU i. The results do not depend on it.
        shards: Preference shards for all attacks that need images, instead of their own, such as different ones for
            validation and test; null: each attack uses its own.
        **drawing: How images are drawn, see `DrawingSettings`.

    Raises:
        UserError: a file or folder given is missing, unreadable or does not fit.
    """
    from lit_safety.attacks.run import AttackRun, attack_table
    from lit_safety.core.errors import UserError
    from lit_safety.core.files import write_atomic
    from lit_safety.core.processes import check_count
    from lit_safety.drawing.arms import collect_arms
    from lit_safety.drawing.pipelines import check_writable, local_pipeline
    from lit_safety.drawing.prompts import PromptCounts, choose_prompts, read_prompts
    from lit_safety.drawing.worlds import check_world, paths_in
    from lit_safety.evaluation.attack_curves import curves_png
    from lit_safety.judges.judge import asked_of, check_labels, check_sees
    from lit_safety.judges.load import load_judge

    check_count(processes, "--processes")
    only = None if only is None else [one for name in only for one in (sets or {}).get(name, [name])]
    if unknown := [name for name in only or () if name not in attacks]:
        known = ", ".join([*attacks, *(sets or {})])
        raise UserError(f"--only: there is no attack {unknown[0]}; the attacks are {known}")
    chosen = {name: one for name, one in attacks.items() if only is None or name in only}
    if not chosen:
        raise UserError("--attacks: give at least one attack, as in configs/attack.yaml")
    for name in chosen:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*", name):
            raise UserError(
                f"--attacks: `{name}` is also used as a folder name: use only letters, digits, blanks and . _ + -"
            )
    if shards is not None:
        for own in chosen.values():
            own.take_shards(shards)
    how = DrawingSettings(edit=None, **drawing)
    selection = PromptCounts(explicit, 0, 0, 0, 0)
    contenders = collect_arms(adapter, arms)
    for name, arm in contenders.items():
        if arm.images is not None:
            raise UserError(
                f"--arms.{name}.images: a folder of images is not a model and cannot be attacked; leave it out"
            )
    check_writable(Path(out))
    everything = read_prompts(prompts, prompt_kind, prompt_category)
    if explicit == 0 or not any(prompt.kind == "explicit" for prompt in everything):
        raise UserError(f"{prompts}: no explicit prompt is left to attack (--explicit {explicit})")
    files = {"--prompts": prompts, "--judge": judge, "--second_judges": second_judges}
    files |= {f"--attacks.{name}": list(paths_in(one.settings)) for name, one in chosen.items()}
    check_world(local_pipeline(pipeline), files, other_world, prompts=everything)
    attacked = choose_prompts(everything, selection)
    judges = [load_judge(spec) for spec in [judge, *(second_judges or [])]]
    for one in judges:
        check_labels(one, attacked, prompts)
        check_sees(one, [category for row in attacked for category in asked_of(row)], f"--prompts {prompts}")
    run = AttackRun(
        pipeline,
        prompts,
        everything,
        attacked,
        selection,
        judges,
        contenders,
        chosen,
        how,
        Path(out),
        seed,
        not_said=everything.not_said(),
        processes=processes,
        judge_specs=[judge, *(second_judges or [])] if processes > 1 else None,
    )
    report = run.execute()
    if run.done:
        print(f"{run.done} attacks on an arm were finished before and are read from {Path(out) / 'done'}")
    plot = Path(out) / "attacks.png"
    write_atomic(plot, curves_png(report))
    file = write_atomic(Path(out) / "attacks.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print(f"\n{attack_table(report)}\n\ncurves   {plot}\nfigures  {file}")
