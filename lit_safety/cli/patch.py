"""The command `patch`: a repair for an aligned adapter restores what it lost, without training safety again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.merging.options import RepairOptions

if TYPE_CHECKING:
    from lit_safety.adapters.low_rank import LowRank
    from lit_safety.drawing.prompts import Prompt
    from lit_safety.evaluation.run import Results
    from lit_safety.merging.experts import Expert
    from lit_safety.merging.repair import Repair
    from lit_safety.worlds.held_out import HeldOut

FORMAT = "lit_safety patch 1"
REPORT = "report.json"
DEFAULT = RepairOptions()


def patch(
    adapter: str,
    *,
    prompts: str,
    judge: str | None = None,
    out: str = "patched",
    pipeline: str | None = None,
    lost: str | None = None,
    repair: RepairOptions = DEFAULT,
    explicit: int = 10,
    implicit: int = 40,
    lookalike: int | None = None,
    clean: int | None = None,
    other_world: bool = False,
    **drawing: Any,
) -> None:
    """Restore what an aligned adapter lost: harmless things that the base draws but the adapter does not.

    Draws validation prompts with base and adapter and judges them. A repair LoRA is trained on the base's own images of
    the lost harmless prompts. It changes rows that matter for these prompts, but not rows that matter for safety. Its
    strength is chosen on the same prompts. Writes into `out`: pytorch_lora_weights.safetensors, the adapter with its
    patch as one LoRA; repair/, only the patch, for use in addition to the adapter; report.json, README.md.

    Args:
        adapter: Folder or file of the aligned LoRA, from any training.
        prompts: Validation prompts: explicit and implicit, clean and look-alikes with the things they ask for (column
            `benign`). Rows marked held_out are not used, and things that a world keeps for reports are refused.
        judge: The judge of harm and of the things in an image; null is only possible with `lost`, and the patch then
            has the first of the strengths.
        out: Folder of the patched adapter; an earlier patch in it is replaced.
        pipeline: Folder or hub id of the base model; null takes the one that the adapter's card names.
        lost: File of harmless prompts that were lost, if no judge knows the model's things; null finds them.
        repair: How the repair is trained, masked and weighted.
        explicit: Number of explicit prompts for each category.
        implicit: Number of implicit prompts.
        lookalike: Number of look-alike prompts; null draws all.
        clean: Number of clean prompts; null draws all.
        other_world: Allow prompts and a judge of an embedded world for a pipeline that is not of this world.
        **drawing: How images are drawn, see `DrawingSettings`.

    Raises:
        UserError: an input is missing or is reserved for reports; nothing was lost; the adapter does not fit.
    """
    from lit_safety.core.progress import quiet_libraries
    from lit_safety.drawing.gallery import DrawingSettings
    from lit_safety.drawing.pipelines import check_writable, local_pipeline
    from lit_safety.drawing.prompts import PromptCounts, choose_prompts, read_prompts
    from lit_safety.drawing.worlds import check_world, refuse_reports_own
    from lit_safety.merging.experts import read_experts
    from lit_safety.merging.merge import base_of

    quiet_libraries()
    files = {"--prompts": prompts, "--judge": judge, "--lost": lost}
    for option, file in files.items():
        if file is not None:
            refuse_reports_own(file, option)
    if judge is None and lost is None:
        raise UserError("patch: give --judge, which finds what was lost, or --lost, a file of lost prompts")
    how = DrawingSettings(edit=None, **drawing)
    _check_out(Path(out), Path(adapter))
    check_writable(Path(out))
    (aligned,) = read_experts([adapter], pipeline)
    base = pipeline or base_of([aligned])
    if base is None:
        raise UserError("patch needs the base model, but the adapter's card names none: give --pipeline")
    folder = local_pipeline(base)
    rows = [row for row in read_prompts(prompts) if not row.held_out]
    given = [row for row in read_prompts(lost) if not row.held_out] if lost is not None else []
    check_world(folder, files, other_world, prompts=rows)
    refuse_unnamed(folder, {"--prompts": rows, "--lost": given})
    if any(row.harmful for row in given):
        raise UserError(f"--lost {lost}: holds harmful prompts; give only clean ones and look-alikes")
    chosen = choose_prompts(rows, PromptCounts(explicit, implicit, lookalike, clean, 0))
    if not any(row.harmful for row in chosen):
        raise UserError(
            f"--prompts {prompts}: holds no harmful prompt, but these are needed to measure where safety matters"
        )
    _Patch(aligned, base, prompts, chosen, [row.prompt for row in given], judge, Path(out), how, repair).run()


class _Patch:
    """One call of `patch`, after its inputs were checked."""

    def __init__(
        self,
        aligned: Expert,
        base: str,
        file: str,
        rows: list[Prompt],
        lost: list[str],
        judge: str | None,
        out: Path,
        how: Any,
        options: RepairOptions,
    ) -> None:
        self.aligned, self.base, self.file, self.rows, self.lost = aligned, base, file, rows, lost
        self.judge, self.out, self.how, self.options = judge, out, how, options
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        from tempfile import TemporaryDirectory

        from lit_safety.adapters.lora import WEIGHTS_NAME
        from lit_safety.adapters.lora_file import write_lora
        from lit_safety.drawing.arms import Arm
        from lit_safety.merging.patching import joined, masked

        self.out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{self.out.name}-", dir=self.out.parent) as work:
            adapter = str(self.aligned.provenance["path"])
            arms = {"base": Arm(), "aligned": Arm(adapter=adapter)}
            found = list(dict.fromkeys(self.lost)) or self._find_lost(arms, Path(work))
            repair, rows = self._train(found)
            safety = dict(self.aligned.layers)
            alone = Path(work) / "repair"
            alone.mkdir()
            write_lora(alone / WEIGHTS_NAME, masked(repair, rows))
            strength = self.options.strengths[0]
            tried: list[dict[str, Any]] = []
            if self.judge is not None:
                arms |= {f"{one:g}": Arm(adapter=adapter, adapters={str(alone): one}) for one in self.options.strengths}
                strength, tried = self._choose(arms, Path(work))
            report = self._report(found, repair, rows, strength, tried)
            self._write(joined(safety, repair, rows, 1.0, strength), masked(repair, rows), report)
        print(
            f"patched   {self.out / WEIGHTS_NAME}\nrepair    {self.out / 'repair'}, for use with the adapter at "
            f"{strength:g}\nreport    {self.out / REPORT}"
        )

    def _find_lost(self, arms: Mapping[str, Any], work: Path) -> list[str]:
        from lit_safety.merging.repair import lost_prompts

        begun = time.monotonic()
        results = self._judged(arms, work)
        harmless = [n for n, row in enumerate(self.rows) if not row.harmful]
        before, after = ([results.rows(name)[n] for n in harmless] for name in ("base", "aligned"))
        self.seconds["finding"] = time.monotonic() - begun
        if not any("benign_recall" in one or "benign_recall_lookalike" in one for one in before):
            raise UserError(
                f"--judge {self.judge}: knows none of the things that {self.file} asks for (column `benign`), so it "
                "cannot find what was lost: give --lost, a file of lost prompts"
            )
        found = lost_prompts([self.rows[n].prompt for n in harmless], before, after)
        if not found:
            raise UserError(f"{self.aligned.name}: lost nothing on {len(harmless)} harmless prompts of {self.file}")
        print(f"lost      {len(found)} of {len(harmless)} harmless prompts, such as `{found[0]}`")
        return found

    def _judged(self, arms: Mapping[str, Any], work: Path) -> Results:
        from lit_safety.drawing.prompts import PromptCounts
        from lit_safety.evaluation.run import Run
        from lit_safety.judges.judge import check_labels
        from lit_safety.judges.load import load_judge
        from lit_safety.judges.placing import Place, place

        judge = load_judge(str(self.judge))
        place(judge, Place.of(self.how.device))
        check_labels(judge, self.rows, self.file)
        counts = PromptCounts(None, None, None, None, 0)
        return Run(
            self.base, self.file, self.rows, counts, [judge], dict(arms), self.how, work, work / "images"
        ).execute()

    def _train(self, found: Sequence[str]) -> tuple[dict[str, LowRank], dict[str, Any]]:
        from lit_safety.backbones.load import load_backbone
        from lit_safety.core.progress import counter
        from lit_safety.merging.options import CalibrationOptions
        from lit_safety.merging.own_prompts import first_prompts
        from lit_safety.merging.patching import masks
        from lit_safety.merging.repair import Repair

        begun = time.monotonic()
        options = self.options
        drawing = CalibrationOptions(
            steps=self.how.steps, guidance=self.how.guidance, batch_size=min(self.how.batch_size, options.batch_size)
        )
        backbone = load_backbone(self.base, key="--pipeline").to(_device(self.how.device))
        work: Repair = Repair(backbone, self.aligned, drawing, options, self.how.resolution)
        examples = work.examples(found, options.images)
        loss: list[float] = []
        with counter("training the repair", options.steps) as tick:
            for one in work.train(examples):
                loss.append(one)
                tick()
        self.loss = (loss[0], loss[-1])
        harmful = first_prompts([(row.kind, row.prompt) for row in self.rows if row.harmful], options.harmful)
        unsafe = work.examples(harmful, 1)
        batches = sum(-(-len(some.prompts) // options.batch_size) for some in (examples, unsafe))
        with counter("measuring which rows matter", batches) as tick:
            harm, lost = work.sizes(unsafe, tick), work.sizes(examples, tick)
        repair = work.updates()
        self.seconds["repair"] = time.monotonic() - begun
        return repair, masks(self.aligned.layers, repair, harm, lost, options)

    def _choose(self, arms: Mapping[str, Any], work: Path) -> tuple[float, list[dict[str, Any]]]:
        """The strength with the fewest wrong images; of equal ones the smallest."""
        from dataclasses import asdict

        from lit_safety.merging.tune import tried_of

        begun = time.monotonic()
        metrics = self._judged(arms, work).metrics()["arms"]
        names = {0.0: "aligned", **{one: f"{one:g}" for one in sorted(self.options.strengths)}}
        tried = [tried_of(strength, metrics[name]) for strength, name in names.items()]
        best = min(tried[1:], key=lambda one: (round(one.wrong, 9), one.mu))
        self.seconds["choosing"] = time.monotonic() - begun
        told = []
        for one in tried:
            shares = {key: value for key, value in asdict(one).items() if key not in ("mu", "fid")}
            told.append({"strength": one.mu, **shares})
        print(_table(told, best.mu))
        return best.mu, told

    def _report(
        self,
        found: Sequence[str],
        repair: Mapping[str, LowRank],
        rows: Mapping[str, Any],
        strength: float,
        tried: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        from dataclasses import asdict

        from lit_safety.merging.patching import told

        return {
            "format": FORMAT,
            "adapter": dict(self.aligned.provenance),
            "base": self.base,
            "prompts": self.file,
            "judge": self.judge,
            "lost": list(found),
            "repair": asdict(self.options),
            "loss": {"first": self.loss[0], "last": self.loss[1]},
            "strength": strength,
            "tried": list(tried),
            "rows": dict(zip(sorted(repair), told(rows), strict=True)),
            "seconds": {name: round(taken, 2) for name, taken in self.seconds.items()},
        }

    def _write(self, whole: Mapping[str, LowRank], alone: Mapping[str, LowRank], report: Mapping[str, Any]) -> None:
        from lit_safety.adapters.lora import WEIGHTS_NAME
        from lit_safety.adapters.lora_file import write_lora
        from lit_safety.core.files import atomic_folder

        with atomic_folder(self.out) as folder:
            (folder / "repair").mkdir()
            write_lora(folder / "repair" / WEIGHTS_NAME, alone)
            size = write_lora(folder / WEIGHTS_NAME, whole).stat().st_size
            text = json.dumps({**report, "megabytes": size / 1e6}, indent=2, ensure_ascii=False)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
            (folder / "README.md").write_text(_card(report), encoding="utf-8")


def held_out_of(pipeline: Path) -> list[HeldOut]:
    """What the world of a pipeline keeps only for reports; empty for a model that is not of an embedded world."""
    from lit_safety.drawing.worlds import WORLDS, marks, world_of

    borne = marks(pipeline)
    names = {world.name for world in WORLDS if borne & world.marks}
    if (own := world_of(pipeline)) is not None:
        names.add(own.name)
    found = []
    if "toyworld" in names:
        from lit_safety.worlds.toyworld import captions

        found.append(captions.held_out(captions.U_TEST))
    if "artworld" in names:
        from lit_safety.judges.art.subjects import U_TEST
        from lit_safety.worlds.artworld import prompts

        found.append(prompts.held_out(U_TEST))
    return found


def refuse_unnamed(pipeline: Path, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse prompts that name what a world keeps for reports, because a report after a repair on it is meaningless.

    Raises:
        UserError: the message names the option, the prompt and what it names.
    """
    for held_out in held_out_of(pipeline):
        for option, rows in prompts.items():
            for row in rows:
                about = [row.category, *row.also] if row.harmful else []
                if (named := held_out.found_in(row.prompt, about)) is not None:
                    raise UserError(
                        f"{option}: `{row.prompt[:120]}` names {named}, which is kept for reports; give validation "
                        "prompts"
                    )


def _check_out(out: Path, adapter: Path) -> None:
    from lit_safety.core.text import load_json

    if out.resolve() in (adapter.resolve(), *adapter.resolve().parents):
        raise UserError(f"--out {out}: contains the adapter; give another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        ours = load_json((out / REPORT).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--out {out}: is not empty and is not an earlier patch; give a new folder")


def _device(asked: str | None) -> str:
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _table(tried: Sequence[Mapping[str, Any]], best: float) -> str:
    keys = ("ip", "ip_implicit", "benign_recall", "benign_recall_lookalike")
    rows: list[tuple[str, ...]] = [("strength", "IP", "implicit", "clean", "look-alikes", "")]
    for one in tried:
        cells = ["-" if one[key] is None else f"{100 * one[key]:.1f}" for key in keys]
        note = "chosen" if one["strength"] == best else "without" if not one["strength"] else ""
        rows.append((f"{one['strength']:g}", *cells, note))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _card(report: Mapping[str, Any]) -> str:
    from lit_safety.report.card import WARNING, Card, card_text, code, settings

    load = 'pipe.load_lora_weights("THIS_FOLDER")'
    what = (
        f"A safety LoRA for {code(report['base'])} with a repair that restores harmless things it had lost. Load it "
        f"with\n\n    {load}\n\n{WARNING}"
    )
    told = {"adapter": report["adapter"].get("path"), "strength of the repair": report["strength"]}
    told |= {"prompts that were lost": len(report["lost"]), **report["repair"]}
    note = (
        "Strength and repair were chosen on the same validation prompts: measure it on others with "
        "`python -m lit_safety evaluate`."
    )
    tags = ["lora", "text-to-image", "safety"]
    return card_text(Card("Patched safety adapter", what, [settings(told, "Patch", note=note)], report["base"], tags))
