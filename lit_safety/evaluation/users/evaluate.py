"""The command `users evaluate`: a user adapter, for many users, next to the base and any other arm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings
from lit_safety.evaluation.users.vlm import UserVLM


def evaluate_users(
    *,
    pipeline: str,
    adapter: str,
    users: str,
    prompts: str,
    judge: str,
    out: str,
    protocol: str | None = None,
    deviate: bool = False,
    arms: dict[str, Arm] | None = None,
    second_judges: list[str] | None = None,
    user_judge: UserVLM | None = None,
    splits: list[str] | None = None,
    each: int | None = None,
    ids: list[str | int] | None = None,
    explicit: int = 4,
    implicit: int = 1,
    clean: int = 10,
    lookalike: int = 2,
    prompt_kind: Literal["explicit", "implicit", "adversarial", "lookalike", "clean"] | None = None,
    prompt_category: str | None = None,
    negative_prompt: str | None = None,
    adapter_negative_prompt: str | None = None,
    order_seed: int = 0,
    processes: int = 1,
    judge_precision: Literal["float32", "float16", "bfloat16"] | None = None,
    blur: bool | None = None,
    images: str | None = None,
    other_world: bool = False,
    **drawing: Any,
) -> None:
    """Draw prompts of what each user bans and allows, and harmless ones, and report whose bounds are kept.

    Every prompt is drawn by `base`, by `psa` (the adapter, for the prompt's own user), by `null` (the adapter, for the
    null user) and by the further arms, from the same seed. Reports Pass and Win Rate, harm in banned prompts and recall
    of allowed and harmless ones, by split. Writes into `out`: metrics.json, table.md, index.html, verdicts.csv, and the
    images under images/, which a second call uses again. A killed run goes on where it stopped.

    Args:
        pipeline: Folder of a diffusers text-to-image pipeline, or its hub id.
        adapter: Folder or file of a user adapter, as `fit --config configs/psa.yaml` leaves it, or of the published
            layout.
        users: Folder with users.csv (profiles and lists) and users.safetensors (embeddings).
        prompts: File as `evaluate` reads it. Where it says who is asked (`user_id`, as Sage's metadata.jsonl and PSA's
            evaluation files do), each user gets the rows that name the user, and the numbers of prompts do not count.
        judge: What decides what is in an image; it must tell categories apart.
        out: Folder of the report; made when it is not there.
        protocol: A published way to measure, by name, psa-sage-seen or psa-sage-unseen (configs/protocols), or a file
            like those: steps, guidance, seeds and the model that says Pass and Win Rate are its own.
        deviate: Allow what differs from the protocol; the report names it. False refuses it.
        arms: Further arms by name, as in `evaluate`, such as a LoRA that suppresses every category; on the command
            line `--arms.NAME.adapter FOLDER`. A user adapter among them draws for each prompt's own user, or for the
            `user` that the arm names.
        second_judges: Further judges; the report holds all figures by each.
        user_judge: A vision-language model that is told profile and lists and says Pass and Win Rate too: a file such
            as configs/judges/user_vlm.yaml. Its answers are kept and not asked for again.
        splits: Whose users are tested: seen, unseen, val, train, or users for a table without splits; null: seen and
            unseen, or all whom the prompt file asks.
        each: Users of each split; null: all.
        ids: Just these users, in quotes: '["0000033"]'.
        explicit: Prompts for each user that name a harm, of each category.
        implicit: Prompts for each user that mean one without naming it, of each category.
        clean: Clean prompts for each user.
        lookalike: Prompts for each user for benign things that resemble harmful ones.
        prompt_kind: What the prompts of a file are that does not say so.
        prompt_category: The harm that they ask for, where the file does not say so.
        negative_prompt: What guidance moves away from, in every arm that names none of its own.
        adapter_negative_prompt: The same for `psa` and `null` alone, as the published code has it; null:
            `negative_prompt`.
        order_seed: Seed of the order in which whoever decides on a win is shown the two images.
        processes: Processes that draw, each with the model; with the device cuda process i takes GPU i.
        judge_precision: Number format in which judges compute, on the device that draws; null: float16 on a GPU,
            float32 on a CPU.
        blur: Veil on the page what the judge calls harmful, until it is clicked; null does so unless the judge knows
            that its images cannot harm anybody, as the toy world's.
        images: Folder of the images; null is images/ in `out`. Evaluations that are given the same folder draw what
            they have in common, such as the base's images, only once.
        other_world: Take prompts and judges of an embedded world, such as data/toyworld, for a pipeline that is not of
            this world; false refuses them.
        **drawing: How images are drawn, see `DrawingSettings`.

    Raises:
        UserError: a file or folder given is missing, unreadable or does not fit, or a user is unknown; nothing has been
            written then.
    """
    from lit_safety.core.hashes import content_sha256
    from lit_safety.core.processes import check_count
    from lit_safety.drawing.given_images import given_images
    from lit_safety.drawing.pipelines import check_writable, local_pipeline
    from lit_safety.drawing.prompts import read_prompts
    from lit_safety.drawing.worlds import check_world
    from lit_safety.evaluation.protocols import Applied, load_protocol, tell_differences
    from lit_safety.evaluation.users.report import user_table, write_user_report
    from lit_safety.evaluation.users.rows import Counts, choose_users, rows_as_asked, rows_for
    from lit_safety.evaluation.users.run import UserRun
    from lit_safety.judges.judge import asked_of, check_labels, check_sees
    from lit_safety.judges.load import load_judge
    from lit_safety.judges.placing import Place, place
    from lit_safety.users.profiles import PROFILES_FILE, read_profiles
    from lit_safety.users.table import Users

    check_count(processes, "--processes")
    applied = None
    if protocol is not None:
        applied = Applied(load_protocol(protocol, "users evaluate"), deviate)
        tell_differences(applied.protocol)
        drawing = applied.drawing(drawing)
        said = applied.protocol.judge
        model = said["init_args"].get("model") if isinstance(said, dict) else None
        if user_judge is None and model is not None:
            applied.lacks(f"--user_judge: the protocol {applied.protocol.name} asks {model}")
        elif user_judge is not None and model is not None:
            applied.value("user_judge", model, user_judge.chat.model, None)
        for key, given in (("each", each), ("ids", ids)):
            applied.value(key, None, given, None)
    elif deviate:
        raise UserError("--deviate: allows what differs from a protocol; name one with --protocol")
    how = DrawingSettings(edit=None, **drawing)
    where = Place.of(how.device, judge_precision)
    counts = Counts(explicit, implicit, clean, lookalike)
    check_writable(Path(out))
    if not Path(adapter).exists():
        raise UserError(f"--adapter {adapter}: does not exist; train one with `fit --config configs/psa.yaml`")
    embeddings, table = Users(users), Path(users) / PROFILES_FILE
    profiles, everything = read_profiles(table), read_prompts(prompts, prompt_kind, prompt_category)
    if applied is not None:
        applied.check_prompts(everything, prompts)
    not_said, named = everything.not_said(), any(prompt.user for prompt in everything)
    if named:
        rows, left_out = rows_as_asked(profiles, everything, splits, each, ids, (prompts, str(table)))
        not_said |= left_out
    else:
        rows = rows_for(choose_users(profiles, splits or ["seen", "unseen"], each, ids, str(table)), everything, counts)
    if applied is not None:
        rows = [replace(row, prompt=prompt) for row in rows for prompt in applied.prepared([row.prompt], 1)]
    # one without an embedding is named before anything else
    embeddings.embeddings(list(dict.fromkeys(row.profile.user_id for row in rows)))
    files = {"--prompts": prompts, "--judge": judge, "--second_judges": second_judges}
    check_world(local_pipeline(pipeline), files, other_world, prompts=everything)
    judges = [load_judge(spec) for spec in [judge, *(second_judges or [])]]
    for one in judges:
        place(one, where)
        check_labels(one, [row.prompt for row in rows], prompts)
        check_sees(one, [category for row in rows for category in asked_of(row.prompt)], f"--prompts {prompts}")
    run = UserRun(
        pipeline=pipeline,
        prompts_file=prompts,
        rows=rows,
        counts=None if named else counts,
        users=embeddings,
        table_sha256=content_sha256(table),
        judges=judges,
        adapter=adapter,
        arms={name: arm.otherwise(negative_prompt) for name, arm in (arms or {}).items()},
        drawing=how,
        out=Path(out),
        images=Path(images) if images else None,
        seed=order_seed,
        vlm=user_judge,
        processes=processes,
        not_said=not_said,
        given=given_images(arms or {}, everything, prompts),
        negative_prompt=negative_prompt,
        named=applied.describe() if applied is not None else None,
        adapter_negative_prompt=adapter_negative_prompt if adapter_negative_prompt is not None else negative_prompt,
    )
    results = run.execute()
    if blur is None:
        blur = other_world or not getattr(judges[0], "harmless", False)
    print(f"\n{user_table(write_user_report(results, blur))}\n")
    print(f"report   {Path(out) / 'index.html'}")
