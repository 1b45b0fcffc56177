"""The command `evaluate`: any pipeline, any number of arms, the same prompts and seeds, one report.

Prompts and a judge that are given in a YAML or in a call, instead of in files, are written out as these files.
"""

from __future__ import annotations

import csv
import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from lit_safety.core.errors import Complaints, UserError
from lit_safety.core.files import write_atomic
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings
from lit_safety.drawing.prompts import HARMFUL_KINDS, KINDS, OWN

if TYPE_CHECKING:
    from lit_safety.evaluation.protocols import Applied


PromptsGiven = list[dict[str, Any] | str] | str
"""A list of rows or of bare prompts, or the file that holds them."""
JudgeGiven = dict[str, Any] | str
"""`class_path` and `init_args`, or the file or folder that describes the judge."""


def prompt_file(prompts: PromptsGiven, out: Path, key: str = "--prompts") -> str:
    """The file of the prompts: the one that was given, or `out`/prompts.csv with the rows that were given.

    A row without a seed gets its place in the list as its seed, so that each prompt has an image of its own.

    Args:
        prompts: rows of `prompt` and what a prompt file's other columns hold, `kind` and `category` above all; a text
            is a row with this prompt alone, as in a file.
        out: the report's folder.
        key: what they were given by, for messages.

    Raises:
        UserError: names every row and key that is wrong, in one line.
    """
    if isinstance(prompts, str):
        return prompts
    if not prompts:
        raise UserError(f"{key}: the list is empty; name some prompts")
    rows: list[dict[str, str]] = []
    complaints = Complaints(key)
    for n, row in enumerate(prompts, 1):
        with complaints.gather():
            rows.append(_row(row, f"{key}: prompt {n}", n))
    complaints.complain()
    columns = [name for name in OWN if any(name in row for row in rows)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "prompts.csv", text.getvalue().encode())
    return str(out / "prompts.csv")


def _row(row: Any, where: str, number: int) -> dict[str, str]:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where} is {str(row)[:60]!r}: write {{prompt: ...}}, and perhaps a kind, one of {', '.join(KINDS)}"
        )
    if unknown := [name for name in row if name not in OWN]:
        raise UserError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(OWN)}")
    cells = {name: _cell(value, f"{where}: {name}") for name, value in row.items() if value is not None}
    if not cells.get("prompt", "").strip():
        raise UserError(f"{where} lacks `prompt`")
    kind = cells.get("kind", "explicit" if cells.get("category") else "")
    if kind and kind not in KINDS:
        raise UserError(f"{where} ({cells['prompt'][:40]}): kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind in HARMFUL_KINDS and not cells.get("category"):
        raise UserError(f"{where} ({cells['prompt'][:40]}): an {kind} prompt needs a category, such as violence")
    return {"seed": str(number), **({"kind": kind} if kind else {}), **cells}


def _cell(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ";".join(map(str, value))
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"{where} is {str(value)[:60]!r}; it must be a text or a number")


def judge_file(judge: JudgeGiven, out: Path, key: str = "--judge") -> str:
    """The file or folder that describes the judge: the one that was given, or `out`/judge.yaml with what was given.

    Args:
        judge: `class_path` and `init_args`, as in configs/judges, or a file or folder.
        out: the report's folder.
        key: what it was given by, for messages.

    Raises:
        UserError: it has no `class_path`, or something else beside it.
    """
    if isinstance(judge, str):
        return judge
    said = plain(judge)
    if "class_path" not in said or said.keys() - {"class_path", "init_args"}:
        raise UserError(
            f"{key}: must be a file, a folder, or `class_path` and `init_args`, as configs/judges/* hold them"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "judge.yaml", yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode())
    return str(out / "judge.yaml")


def plain(value: Any) -> Any:
    """Nested settings as plain lists and mappings: jsonargparse hands a mapping with a class_path on as an object."""
    if not isinstance(value, Mapping | str | Sequence) and hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _apply(protocol: str, deviate: bool) -> Applied:
    from lit_safety.evaluation.protocols import Applied, load_protocol, tell_differences

    found = load_protocol(protocol)
    tell_differences(found)
    return Applied(found, deviate)


def _default(option: str) -> Any:
    return inspect.signature(evaluate).parameters[option].default


def _canonical(categories: Sequence[str] | None) -> tuple[str, ...] | None:
    from lit_safety.core.categories import canonical_category

    return tuple(canonical_category(name) for name in categories) if categories is not None else None


def evaluate(
    *,
    pipeline: str,
    prompts: PromptsGiven,
    judge: JudgeGiven | None = None,
    out: str,
    protocol: str | None = None,
    deviate: bool = False,
    any_of: int = 1,
    audit: str | None = None,
    questions: str | None = None,
    adapter: str | None = None,
    arms: dict[str, Arm] | None = None,
    second_judges: list[str] | None = None,
    fid: Literal["judge", "inception"] | None = None,
    reference: str | None = None,
    clip: str | None = None,
    preference: list[str] | None = None,
    explicit: int | None = 40,
    implicit: int | None = 80,
    lookalike: int | None = 80,
    clean: int | None = 200,
    adversarial: int | None = 200,
    categories: list[str] | None = None,
    prompt_kind: Literal["explicit", "implicit", "adversarial", "lookalike", "clean"] | None = None,
    prompt_category: str | None = None,
    negative_prompt: str | None = None,
    processes: int = 1,
    judge_precision: Literal["float32", "float16", "bfloat16"] | None = None,
    edit: Literal["image_to_image", "inpainting"] | None = None,
    edit_images: str | None = None,
    edit_strength: float = 0.7,
    edit_part: Literal["left", "right", "middle", "all"] = "middle",
    blur: bool | None = None,
    images: str | None = None,
    attacks: str | None = None,
    other_world: bool = False,
    **drawing: Any,
) -> dict[str, Any]:
    """Draw the same prompts and seeds with every arm, judge the images, and write a report.

    Writes into `out`: metrics.json, table.md, before_after.png, index.html, verdicts.csv, and the images under
    images/, which a second call with the same weights and settings uses again. A killed run goes on where it stopped.

    Args:
        pipeline: Folder of a diffusers text-to-image pipeline, or its hub id.
        prompts: File with a column `prompt`, and perhaps kind, category, concept, benign, held_out, seed, unnamed,
            guidance, pair (CSV, JSON, JSON lines, parquet), or a text with a prompt a line; or CoProV2's test file,
            I2P, Unsafe Diffusion, COCO, MMA, P4D, Ring-A-Bell, Sage or PSA's files as they are published; or a list of
            such rows, `[{prompt: a red kite, kind: clean}]`, which is written to prompts.csv in `out`.
        judge: What decides what is harmful: folder of a toy-world judge, of a cost model or of a CLIP, or a file such
            as configs/judges/nudenet_or_q16.yaml; or what such a file holds, which is written to judge.yaml in `out`;
            null: that of the protocol.
        out: Folder of the report; made when it is not there.
        protocol: A published way to measure, by name, such as safetydpo-i2p or ncd-harmful (configs/protocols), or a
            file like those: steps, guidance, seeds, judge and what is counted are its own, and every prompt is drawn.
        deviate: Allow what differs from the protocol, such as another judge or a part of the prompts; the report names
            it. False refuses it.
        any_of: Images of each prompt that asks for harm, from seeds that follow from its own; above 1 the report also
            says of how many prompts any image is harmful.
        audit: An audit.json of the judge, as `judge-audit` writes it, or its folder: the report then also holds rates
            of harm that are corrected for the judge's errors, with intervals that know both samples.
        questions: Who answers the questions about counts, colours and places that the prompt file asks (its column
            `questions`): `judge`, the judge that decides, where it can; a judge's folder; or a file such as
            configs/judges/vqa.yaml. Null: the judge that decides, where it can.
        adapter: Folder or file of a LoRA, or of a user adapter, which then draws for the null user; drawn as the arm
            `aligned` next to the arm `base`.
        arms: Further arms by name, each with adapter, scale, pipeline, unet (one that was published alone; unet_partial
            where its file holds the changed weights only), negative_prompt, adapters (several, with weights), guard
            (safe latent diffusion, SAFREE), and for a user adapter user and users (whom it draws for, and the file with
            the embedding); or with images, a folder of what another program drew for these prompts; on the command line
            `--arms.NAME.adapter FOLDER --arms.NAME.scale 0.5`.
        second_judges: Further judges; the report holds their figures and how often they disagree with `judge`.
        fid: Whose features FID compares, on clean prompts, with the base's images: the judge's own or Inception's
            (needs the extra `inception`); null: no FID.
        reference: Further images for FID to compare with: a folder of images, or shards, of which the chosen
            images of clean pairs are taken.
        clip: Folder (or hub id) of a transformers CLIP for CLIPScore on clean prompts; null: no CLIPScore.
        preference: Preference scorers for images of clean prompts, files such as configs/scorers/pickscore.yaml.
        explicit: Explicit prompts drawn for each category; null draws all, 0 none.
        implicit: Implicit prompts, half of them with held-out phrases; null draws all, 0 none.
        lookalike: Prompts for benign things that resemble harmful ones; null draws all, 0 none.
        clean: Clean prompts, half of them for two objects; null draws all, 0 none.
        adversarial: Adversarial prompts drawn, with the prompts that they attack; null draws all, 0 none.
        categories: Draw prompts for harms of these categories only, and the clean and look-alike ones; null: of all.
        prompt_kind: What the prompts of a published file are, where its columns do not say so.
        prompt_category: The harm that they ask for, where its columns do not say so.
        negative_prompt: What guidance moves away from, in every arm that names none of its own, the base too.
        processes: Processes that draw, each with the model; with the device cuda process i takes GPU i. The pixels
            are those that one process draws.
        judge_precision: Number format in which judges, preference scorers, and the networks of FID and CLIPScore
            compute, on the device that draws; null: float16 on a GPU, float32 on a CPU. What runs ONNX, answers at an
            endpoint or names a device or a number format of its own keeps it.
        edit: Redraw images instead of drawing: the whole image, or a part of it; null draws from text alone.
        edit_images: What is redrawn, the same image for a prompt in every arm: a folder of images, or shards, of
            which the chosen images of clean pairs are taken.
        edit_strength: Share of the noise schedule that is drawn again; 1 keeps nothing but what a mask keeps.
        edit_part: The part that inpainting draws again.
        blur: Blur what the judge calls harmful in before_after.png; null does so unless the judge knows that its
            images cannot harm anybody, as the toy world's. index.html always blurs until clicked.
        images: Folder of the images; null is images/ in `out`. Evaluations that are given the same folder draw what
            they have in common, such as the base's images, only once.
        attacks: An attacks.json, as `attack` writes it, or its folder, whose curves the page shows; null takes the
            one in `out`, if there is one.
        other_world: Take prompts and judges of an embedded world, such as data/toyworld, for a pipeline that is not of
            this world; false refuses them.
        **drawing: How images are drawn, see `DrawingSettings`.

    Returns: the report's figures and settings, as they stand in metrics.json.

    Raises:
        UserError: a file or folder given is missing, unreadable or does not fit; nothing has been written then.
    """
    from lit_safety.core.processes import check_count
    from lit_safety.drawing.arms import collect_arms
    from lit_safety.drawing.edits import Edit
    from lit_safety.drawing.given_images import given_images
    from lit_safety.drawing.pipelines import check_writable, local_pipeline
    from lit_safety.drawing.prompts import PromptCounts, choose_prompts, read_prompts
    from lit_safety.drawing.worlds import check_world
    from lit_safety.evaluation.attack_curves import find_attacks
    from lit_safety.evaluation.audit import read_audit
    from lit_safety.evaluation.protocols import apply_seeds
    from lit_safety.evaluation.quality import Quality
    from lit_safety.evaluation.report import write_report
    from lit_safety.evaluation.run import Run
    from lit_safety.evaluation.tables import report_table
    from lit_safety.judges.answering import load_answerer
    from lit_safety.judges.judge import check_labels
    from lit_safety.judges.load import load_judge
    from lit_safety.judges.placing import Place, place
    from lit_safety.judges.scorers import load_scorer

    check_count(processes, "--processes")
    check_count(any_of, "--any_of")
    applied, counts = None, {"explicit": explicit, "implicit": implicit, "lookalike": lookalike, "clean": clean,
                             "adversarial": adversarial}  # fmt: skip
    if protocol is not None:
        applied = _apply(protocol, deviate)
        judge = applied.judge(judge)
        counts = {key: applied.value(key, None, count, _default(key), "") for key, count in counts.items()}
        categories = applied.value("categories", None, categories, None)
        drawing = applied.drawing(drawing)
        needs, quality_of = applied.protocol.prompts, applied.protocol.quality
        prompt_kind = applied.value("prompt_kind", needs.kind, prompt_kind, None)
        prompt_category = applied.value("prompt_category", needs.category, prompt_category, None)
        if "fid" in quality_of:  # further figures of quality may be asked for
            fid = applied.value("fid", quality_of["fid"], fid, None)
        if "clip" in quality_of:
            clip = applied.value("clip", quality_of["clip"], clip, None)
        any_of = applied.value("any_of", applied.protocol.images, any_of, 1)
        if "reference" in quality_of and reference is None:
            applied.lacks(f"--reference: the protocol {applied.protocol.name} compares with {quality_of['reference']}")
    elif deviate:
        raise UserError("--deviate: allows what differs from a protocol; name one with --protocol")
    if judge is None:
        raise UserError("--judge: name what decides what is harmful, such as data/toyworld/judge or "
                        "configs/judges/nudenet_or_q16.yaml, or a --protocol, which has its own")  # fmt: skip
    if (edit is None) is not (edit_images is None):
        raise UserError("--edit and --edit_images: give both or neither")
    change = Edit(edit, edit_images, edit_strength, edit_part) if edit and edit_images else None
    how = DrawingSettings(edit=change, **drawing)
    where = Place.of(how.device, judge_precision)
    selection = PromptCounts(**counts, categories=_canonical(categories))
    contenders = collect_arms(adapter, arms, negative_prompt)
    if change is not None and (ready := [name for name, arm in contenders.items() if arm.images is not None]):
        raise UserError(
            f"--edit: the arm {ready[0]} is a folder of images, which cannot be redrawn; remove one of them"
        )
    check_writable(Path(out))
    prompts, judge = prompt_file(prompts, Path(out)), judge_file(judge, Path(out))
    measured = read_audit(audit) if audit is not None else None
    curves = find_attacks(attacks, Path(out))
    if change is not None:
        change.describe()  # reads the images: what is wrong with them is said before anything is drawn
    everything = read_prompts(prompts, prompt_kind, prompt_category)
    if applied is not None:
        applied.check_prompts(everything, prompts)
    if any_of > 1 and (ready := [name for name, arm in contenders.items() if arm.images is not None]):
        raise UserError(f"--any_of: the arm {ready[0]} is a folder with one image a prompt; leave one of both out")
    files = {"--prompts": prompts, "--judge": judge, "--second_judges": second_judges, "--clip": clip}
    if questions not in (None, "judge"):
        files |= {"--questions": questions}
    check_world(local_pipeline(pipeline), files | {"--reference": reference}, other_world, prompts=everything)
    given = given_images(contenders, everything, prompts)
    chosen = choose_prompts(everything, selection)
    if applied is not None:
        chosen = applied.prepared(chosen, any_of)
    elif any_of > 1:
        chosen = apply_seeds(chosen, images=any_of)
    judges = [load_judge(spec) for spec in [judge, *(second_judges or [])]]
    for one in judges:
        place(one, where)
        check_labels(one, chosen, prompts)
    answerer = None
    asked_about = any(prompt.questions for prompt in chosen)
    if questions is not None and not asked_about:
        raise UserError(f"--questions: {prompts} asks nothing about images; give its prompts the column `questions`")
    if asked_about and (questions is not None or callable(getattr(judges[0], "answer", None))):
        answerer = load_answerer(questions or "judge", judges[0])
        place(answerer, where)
    if measured is not None:
        measured.check(judges[0], str(audit))
    shared = Path(images) if images else None
    scorers = [load_scorer(spec) for spec in preference or ()]
    for scorer in scorers:
        place(scorer, where)
    asked = fid or clip or reference or scorers
    quality = Quality(chosen, judges[0], fid, clip, reference, scorers, where) if asked else None
    run = Run(
        pipeline, prompts, chosen, selection, judges, contenders, how, Path(out), shared, quality, processes,
        everything.not_said(), given, applied.describe() if applied is not None else None, answerer, measured,
    )  # fmt: skip
    results = run.execute()
    if blur is None:
        blur = other_world or not getattr(judges[0], "harmless", False)
    metrics = write_report(results, blur, curves)
    print(f"\n{report_table(metrics)}\n")
    print(f"report   {Path(out) / 'index.html'}\nimage    {Path(out) / 'before_after.png'}")
    return metrics
