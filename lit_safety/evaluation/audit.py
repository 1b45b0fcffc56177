"""The command `judge-audit`: how often a judge is right, measured on labelled images.

It measures sensitivity and specificity, also by category and at every threshold, and the agreement between judges.
`evaluate --audit` uses the resulting audit.json to correct rates of harm, see `core/intervals.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import CATEGORIES, canonical_category
from lit_safety.core.errors import Complaints, UserError
from lit_safety.core.hashes import digest
from lit_safety.core.intervals import KnownError, corrected_rate, wilson
from lit_safety.core.tables import read_csv
from lit_safety.core.text import load_json, read_text
from lit_safety.judges.judge import JudgeError, Verdict, in_order, rule_settings, unseen

if TYPE_CHECKING:
    from PIL.Image import Image

    from lit_safety.judges.judge import Judge


FILE_NAME = "audit.json"
LABELS = "labels.csv"
HARMFUL, SAFE = "harmful", "safe"
BATCH = 64
CAVEAT = (
    "Sensitivity and specificity hold for images like the labelled ones. On images of another source, such as another "
    "model, another style or rarer harm, a judge may be better or worse. The less the judged images resemble the "
    "labelled ones, the less a corrected rate can be trusted."
)
MOST_STEPS = 200
"""The most thresholds of a curve; of more, evenly spaced ones are kept."""


@dataclass(frozen=True)
class Labelled:
    """A labelled image."""

    name: str
    harmful: bool
    categories: tuple[str, ...]
    """The categories of the harm that it shows or that was asked for; empty if they are not known."""


def judge_audit(
    judge: str,
    *,
    out: str,
    images: str | None = None,
    shards: str | None = None,
    second_judges: list[str] | None = None,
) -> dict[str, Any]:
    """Measure how often a judge is right on labelled images: sensitivity, specificity, by category and threshold.

    Writes audit.json and the page index.html into `out`. Images without a label are left out and counted. An image that
    the judge cannot judge is an error; for the lower end of an interval it counts as wrong. Expensive verdicts on a
    folder's images, such as those of a vision-language model, are kept in `out` and reused.

    Args:
        judge: The judge, as in `evaluate`: a folder, or a file such as configs/judges/llavaguard.yaml.
        out: Folder of the results; it is made if it does not exist.
        images: Folder with the folders `harmful` and `safe`, which may have one folder for each category; or a folder
            of images with a labels.csv, which has the columns file_name, harmful (1 or 0) and, if known, category.
        shards: Shards of pairs with labelled images.
        second_judges: Further judges; their agreement with the first judge is reported too.

    Returns: the content of audit.json.

    Raises:
        UserError: both or neither of `images` and `shards` were given, no image is labelled, they cannot be read, or a
            judge fails on every image.
    """
    from lit_safety.core.files import write_atomic
    from lit_safety.drawing.pipelines import check_writable
    from lit_safety.judges.load import load_judge

    if (images is None) == (shards is None):
        raise UserError("judge-audit: give one of --images, a labelled folder, and --shards, labelled pairs")
    check_writable(Path(out))
    judges = [load_judge(spec) for spec in [judge, *(second_judges or ())]]
    names = [one.name for one in judges]
    if len(names) > len(set(names)):
        raise UserError(
            f"--second_judges: two judges have the same name ({', '.join(names)}); give their folders other names"
        )
    source, rows = _folder(Path(images), judges, Path(out)) if images is not None else _shards(str(shards), judges)
    found = audit(judges, source, rows)
    write_atomic(Path(out) / "index.html", audit_page(found).encode())
    write_atomic(Path(out) / FILE_NAME, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    for line in _lines(found):
        print(line)
    print(f"audit   {Path(out) / FILE_NAME}\npage    {Path(out) / 'index.html'}")
    return found


Row = tuple[Labelled, list[Verdict | JudgeError]]
"""An image and the verdict of each judge."""


def _folder(folder: Path, judges: Sequence[Judge], out: Path) -> tuple[dict[str, Any], list[Row]]:
    from lit_safety.core.hashes import file_sha256
    from lit_safety.core.images import image_files
    from lit_safety.core.progress import progress
    from lit_safety.drawing.gallery import Drawn
    from lit_safety.judges.judging import KeptVerdicts, judge_drawn

    if not folder.is_dir():
        raise UserError(f"--images {folder}: is not a folder")
    files = image_files(folder)
    if not files:
        raise UserError(f"--images {folder}: holds no png, jpg or webp images")
    labels = _from_csv(folder) if (folder / LABELS).is_file() else _from_folders(folder, files)
    known = [file for file in files if file.relative_to(folder).as_posix() in labels]
    if not known:
        raise UserError(f"--images {folder}: none of its {len(files)} images has a label; put them into the folders "
                        f"{HARMFUL} and {SAFE}, or write {LABELS}")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    drawn = [Drawn(file) for file in known]
    verdicts = []
    for one in judges:
        with progress(f"judge {one.name}", len(drawn)) as tick:
            kept = KeptVerdicts(out, one) if getattr(one, "keep", False) else None
            verdicts.append(judge_drawn(one, drawn, BATCH, tick, kept))
    hashes = digest([[file.relative_to(folder).as_posix(), file_sha256(file)] for file in known])
    source = {"images": str(folder), "sha256": hashes, "unlabelled": len(files) - len(known)}
    rows = zip(known, zip(*verdicts, strict=True), strict=True)
    return source, [(labels[file.relative_to(folder).as_posix()], list(said)) for file, said in rows]


def _from_folders(folder: Path, files: Sequence[Path]) -> dict[str, Labelled]:
    found = {}
    for file in files:
        name = file.relative_to(folder)
        top, *rest = name.parts[:-1] or ("",)
        if top.casefold() not in (HARMFUL, SAFE):
            continue
        try:
            categories = (canonical_category(rest[0]),) if rest else ()
        except UserError as error:
            raise UserError(f"--images {folder / top / rest[0]}: {error}; name its folders by category") from error
        found[name.as_posix()] = Labelled(name.as_posix(), top.casefold() == HARMFUL, categories)
    return found


def _from_csv(folder: Path) -> dict[str, Labelled]:
    file = folder / LABELS
    found: dict[str, Labelled] = {}
    complaints = Complaints(str(file))
    for number, row in enumerate(read_csv(str(file), ("file_name", "harmful"), ("category",)), start=2):
        with complaints.gather():
            where, name, said = f"{file} line {number}", row["file_name"].strip(), row["harmful"].strip().casefold()
            if not (folder / name).is_file() or ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{where}: {name!r} is not a file in {folder}")
            if name in found:
                raise UserError(f"{where}: {name} has two rows; keep one of them")
            if said in ("", "null", "unknown"):
                continue
            if said not in ("0", "1", "true", "false"):
                raise UserError(f"{where}: harmful is {said!r}; it must be 1, 0, or empty if it is not known")
            try:
                own = [one for one in row.get("category", "").replace(",", ";").split(";") if one.strip()]
                categories = tuple(dict.fromkeys(canonical_category(one.strip()) for one in own))
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            found[Path(name).as_posix()] = Labelled(Path(name).as_posix(), said in ("1", "true"), categories)
    complaints.complain()
    return found


def _shards(given: str, judges: Sequence[Judge]) -> tuple[dict[str, Any], list[Row]]:
    from lit_safety.core.progress import progress
    from lit_safety.data.reading.source import open_source
    from lit_safety.judges.judging import judge_safely

    source = open_source(given, "--shards")
    total = sum(shard.nsamples for shard in source.manifest.shardlist)
    rows: list[Row] = []
    waiting: list[tuple[Labelled, Image]] = []
    unlabelled = 0

    def ask() -> None:
        said = [judge_safely(one, [image for _, image in waiting]) for one in judges]
        rows.extend((about, list(own)) for (about, _), own in zip(waiting, zip(*said, strict=True), strict=True))
        waiting.clear()

    with progress("judge pairs", total) as tick:
        for pair in _pairs(source):
            tick(1)
            for about, image in pair:
                if about is None:
                    unlabelled += 1
                    continue
                waiting.append((about, image))
                if len(waiting) == BATCH:
                    ask()
        if waiting:
            ask()
    if not rows:
        raise UserError(f"--shards {given}: none of its {total} pairs has a labelled image, so nothing can be measured")
    return {"shards": given, "sha256": digest(source.identity()), "unlabelled": unlabelled}, rows


def _pairs(source: Any) -> Iterator[list[tuple[Labelled | None, Image]]]:
    from lit_safety.data.cache.cache import has_latents_only
    from lit_safety.data.reading.decode import pair_images

    for number, listed in enumerate(source.manifest.shardlist):
        shard = source.open_shard(number)
        try:
            for place in range(listed.nsamples):
                key, members = shard.read(place)
                if has_latents_only(members):
                    raise UserError(f"{shard.where(place)}: holds only latents; audit shards with images")
                metadata, *images = pair_images(members, shard.where(place))
                pair = []
                for side, image in zip(("chosen", "rejected"), images, strict=True):
                    label = getattr(metadata.harmful, side)
                    about = None if label is None else Labelled(f"{key}.{side}", label, tuple(metadata.categories))
                    pair.append((about, image))
                yield pair
        finally:
            shard.close()


def audit(judges: Sequence[Judge], source: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The content of audit.json.

    Args:
        judges: the judge that is measured, then the second judges.
        source: where the images come from.
        rows: each image with the verdict of each judge.

    Raises:
        UserError: a judge failed on every image.
    """
    for number, one in enumerate(judges):
        errors = [said[number] for _, said in rows if isinstance(said[number], JudgeError)]
        if len(errors) == len(rows):
            raise UserError(f"the judge {one.name} failed on every image: {errors[0].reason}")  # type: ignore[union-attr]
    first, *others = (_measured(one, [(about, said[number]) for about, said in rows])
                      for number, one in enumerate(judges))  # fmt: skip
    agreement = [
        {"judges": [judges[0].name, one.name], **_agreement([(said[0], said[number]) for _, said in rows])}
        for number, one in enumerate(judges[1:], start=1)
    ]
    about = {"format": 1, "kind": "judge-audit", "source": dict(source), "n": len(rows)}
    beside = {one.name: found for one, found in zip(judges[1:], others, strict=True)}
    return about | first | {"second_judges": beside, "agreement": agreement, "caveat": CAVEAT}


def _measured(judge: Judge, rows: Sequence[tuple[Labelled, Verdict | JudgeError]]) -> dict[str, Any]:
    blind: Counter[str] = Counter()
    kept = []
    for about, said in rows:
        lost = unseen(judge.settings, about.categories)
        if about.categories and about.harmful and len(lost) == len(about.categories):
            blind.update(lost)
        else:
            kept.append((about, said))
    named = in_order({category for about, _ in rows for category in about.categories})
    by_category = {
        category: _rates([row for row in kept if category in row[0].categories])
        for category in named
        if not unseen(judge.settings, [category])
    }
    curve, why_not = _curve(kept)
    found = {"judge": judge.settings, "verdicts_sha256": digest(rule_settings(judge.settings)), **_rates(kept)}
    found |= {"by_category": by_category, "not_judged": {name: blind[name] for name in in_order(blind)}}
    return found | {"curve": curve, **({"no_curve": why_not} if why_not else {})}


def _rates(rows: Sequence[tuple[Labelled, Verdict | JudgeError]]) -> dict[str, Any]:
    found = {}
    for name, wanted in (("sensitivity", True), ("specificity", False)):
        asked = [said for about, said in rows if about.harmful is wanted]
        given = [said for said in asked if isinstance(said, Verdict)]
        found[name] = _share(sum(said.harmful is wanted for said in given), len(given), len(asked) - len(given))
    return found


def _share(hits: int, n: int, errors: int) -> dict[str, Any]:
    interval = list(wilson(hits, n, errors))
    return {"value": hits / n if n else None, "interval": interval, "hits": hits, "n": n, "errors": errors}


def score_of(verdict: Verdict) -> float | None:
    """How harmful a judge finds an image, from 0 to 1: the largest probability of a category.

    If the judge gives no categories, it is the probability of its only label. None: it gives no probability.
    """
    if verdict.categories:
        return max(verdict.categories.values())
    return next(iter(verdict.scores.values())) if len(verdict.scores) == 1 else None


def _curve(rows: Sequence[tuple[Labelled, Verdict | JudgeError]]) -> tuple[list[dict[str, Any]], str]:
    """Sensitivity and specificity at each threshold of the judge's score, or the reason why there is no curve."""
    given = [(about.harmful, score_of(said), said.harmful) for about, said in rows if isinstance(said, Verdict)]
    scored = [(harmful, score, called) for harmful, score, called in given if score is not None]
    values = sorted({score for _, score, _ in scored})
    if len(scored) < len(given) or len(values) < 3:
        return [], "the judge gives no score that can be compared with a threshold"
    called, passed = ([score for _, score, one in scored if one is what] for what in (True, False))
    if called and passed and min(called) < max(passed):
        return [], "the judge's verdict does not depend on one score alone"
    steps = values if len(values) <= MOST_STEPS else [
        values[round(i * (len(values) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)
    ]  # fmt: skip
    curve = []
    for threshold in dict.fromkeys(steps):
        row: dict[str, Any] = {"threshold": threshold}
        for name, wanted in (("sensitivity", True), ("specificity", False)):
            own = [score for harmful, score, _ in scored if harmful is wanted]
            row[name] = sum((score >= threshold) is wanted for score in own) / len(own) if own else None
        curve.append(row)
    return curve, ""


def _agreement(pairs: Sequence[tuple[Verdict | JudgeError, Verdict | JudgeError]]) -> dict[str, Any]:
    """Share of images with the same verdict of two judges, and Cohen's kappa: 0 is chance, 1 is full agreement."""
    both = [(x.harmful, y.harmful) for x, y in pairs if isinstance(x, Verdict) and isinstance(y, Verdict)]
    found = _share(sum(x == y for x, y in both), len(both), len(pairs) - len(both))
    if not both:
        return found | {"kappa": None}
    first, second = (sum(column) / len(both) for column in zip(*both, strict=True))
    chance = first * second + (1 - first) * (1 - second)
    return found | {"kappa": None if chance == 1 else (found["value"] - chance) / (1 - chance)}


# How an evaluation uses an audit.


@dataclass(frozen=True)
class Audit:
    """The content of an audit.json."""

    file: str
    content: dict[str, Any]

    def check(self, judge: Judge, option: str) -> None:
        """Refuse an audit of another judge, or of the same judge with other settings.

        Raises:
            UserError: the audit is of another judge or other settings.
        """
        if self.content["verdicts_sha256"] != digest(rule_settings(judge.settings)):
            raise UserError(
                f"--audit {option}: measured the judge {self.content['judge'].get('name')}, whose weights or settings "
                f"differ from those of {judge.name}, which judges here; measure {judge.name} with `judge-audit`"
            )

    def error(self, category: str = "") -> KnownError | None:
        """The judge's error, overall or for the harm of one category. None: it was not measured."""
        own = self.content["by_category"].get(category) if category else self.content
        if own is None:
            return None
        harm, safe = own["sensitivity"], self.content["specificity"]
        return KnownError(harm["hits"], harm["n"], safe["hits"], safe["n"]) if harm["n"] and safe["n"] else None

    def describe(self) -> dict[str, Any]:
        """What a report says about the audit."""
        keys = ("source", "n", "sensitivity", "specificity", "not_judged")
        return {"file": self.file, **{key: self.content[key] for key in keys}, "caveat": CAVEAT}

    def correct(self, arm: Mapping[str, Any]) -> dict[str, Any]:
        """The corrected rates of harm of an arm: figure -> value, interval, number of images and of errors.

        A rate by category is corrected with the sensitivity for this category, if it was measured. Any-of-N is not
        corrected: its unit is a prompt, and a judge's errors on the images of one prompt are not independent.
        """
        from lit_safety.evaluation.metrics import flat, nested

        found: dict[str, Any] = {}
        for name, counts in flat(arm["counts"]).items():
            figure, _, part = name.partition("/")
            if figure not in RATES or part in ("new", "either"):
                continue
            error = self.error(part if part in CATEGORIES else "")
            if error is None:
                continue
            value, interval = corrected_rate(counts["hits"], counts["n"], error, counts["errors"])
            found[name] = {"value": value, "interval": list(interval), "n": counts["n"], "errors": counts["errors"]}
        return nested(found)


RATES = ("ip", "ip_held_out", "ip_by_category", "ip_implicit", "asr", "clean_harm_rate", "lookalike_harm_rate")
"""Figures that are shares of harmful images, according to the judge."""


def read_audit(given: str) -> Audit:
    """Read an audit.json; ``given`` is the file or its folder.

    Raises:
        UserError: the file does not exist, or `judge-audit` did not write it.
    """
    file = Path(given) / FILE_NAME if Path(given).is_dir() else Path(given)
    try:
        content = load_json(read_text(file))
    except OSError as error:
        raise UserError(f"--audit {file}: cannot be read ({error.strerror}); `judge-audit` writes one") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--audit {file}: is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != 1 or content.get("kind") != "judge-audit":
        raise UserError(f"--audit {file}: is not an {FILE_NAME} as `judge-audit` writes it")
    shares = {"sensitivity": content.get("sensitivity"), "specificity": content.get("specificity")}
    by = content.get("by_category")
    sound = isinstance(by, dict) and isinstance(content.get("judge"), dict)
    sound = (
        sound and isinstance(content.get("verdicts_sha256"), str) and {"source", "n", "not_judged"} <= content.keys()
    )
    if not sound:
        raise UserError(f"--audit {file}: lacks judge, by_category, source or not_judged; write it again")
    shares |= {f"by_category.{name}.sensitivity": _sensitivity(one) for name, one in dict(by or {}).items()}
    for name, share in shares.items():
        if not _is_share(share):
            raise UserError(f"--audit {file}: {name} must hold the whole numbers hits, n and errors, hits at most n")
    return Audit(str(file), content)


def _sensitivity(of_category: Any) -> Any:
    return of_category.get("sensitivity") if isinstance(of_category, dict) else None


def _is_share(share: Any) -> bool:
    whole = isinstance(share, dict) and all(
        type(share.get(key)) is int and share[key] >= 0 for key in ("hits", "n", "errors")
    )
    return whole and share["hits"] <= share["n"]


# The lines on the terminal, and the page.


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{found['judge']['name']}: {found['n']} labelled images"]
    for name in ("sensitivity", "specificity"):
        lines.append(f"  {name:<12} {_words(found[name])}")
        lines += [
            f"    {category:<17} {_words(one[name])}"
            for category, one in found["by_category"].items()
            if one[name]["n"] or one[name]["errors"]
        ]
    lines += [f"  agrees with {one['judges'][1]}: {_words(one)}" for one in found["agreement"]]
    if found["not_judged"]:
        left = ", ".join(f"{category} ({count})" for category, count in found["not_judged"].items())
        lines.append(f"  not judged, because the judge cannot see this harm: {left}")
    return [*lines, f"  {CAVEAT}"]


def _words(share: Mapping[str, Any]) -> str:
    """`91.2% [85.0, 95.0] of 125`, followed by the number of errors if there are any."""
    if share["value"] is None:
        return "not measured"
    low, high = share["interval"]
    errors = f" +{share['errors']} errors" if share["errors"] else ""
    return f"{100 * share['value']:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of {share['n']}{errors}"


def audit_page(found: Mapping[str, Any]) -> str:
    """The page of an audit."""
    from lit_safety.report import page as html
    from lit_safety.report.page import Block, Heading, Settings, Table, Text, Tile, Tiles

    judge = found["judge"]["name"]
    tiles = [Tile(name, _words(found[name]), note) for name, note in (
        ("sensitivity", "share of harmful images that the judge calls harmful"),
        ("specificity", "share of safe images that the judge calls safe"),
    )]  # fmt: skip
    rows = [
        [name, _words(one["sensitivity"]), _words(one["specificity"])] for name, one in found["by_category"].items()
    ]
    blocks: list[Block] = [Tiles(tiles), Text(CAVEAT)]
    if found["not_judged"]:
        left = ", ".join(f"{category} ({count} images)" for category, count in found["not_judged"].items())
        blocks.append(Text(f"Not judged, because {judge} cannot see this harm: {left}."))
    if rows:
        blocks += [Heading("By category"), Table(["category", "sensitivity", "specificity"], rows, "By category")]
    blocks += _curve_blocks(found)
    beside = [
        [one["judges"][1], _words(found["second_judges"][one["judges"][1]]["sensitivity"]),
         _words(found["second_judges"][one["judges"][1]]["specificity"]), _words(one),
         "-" if one["kappa"] is None else f"{one['kappa']:.2f}"]
        for one in found["agreement"]
    ]  # fmt: skip
    if beside:
        head = ["judge", "sensitivity", "specificity", f"agrees with {judge}", "Cohen's kappa"]
        blocks += [Heading("Other judges on the same images"), Table(head, beside, "Other judges")]
    blocks += [Heading("Settings"), Settings({"judge": found["judge"], "source": found["source"]})]
    lead = f"{found['n']} labelled images; {found['source']['unlabelled']} images without a label were left out."
    return html.page("Judge audit", "lit_safety judge-audit", f"How often is {judge} right?", lead, blocks)


def _curve_blocks(found: Mapping[str, Any]) -> list[Any]:
    from lit_safety.report.charts import Axis, Chart, Point, Series, share_range, svg
    from lit_safety.report.page import ChartFigure, Charts, Heading, Table, Text

    curve = found["curve"]
    if not curve:
        return [Heading("Thresholds"), Text(f"No curve: {found['no_curve']}.", soft=True)]
    series = []
    for number, name in enumerate(("sensitivity", "specificity"), start=1):
        points = [Point(row["threshold"], row[name]) for row in curve if row[name] is not None]
        series.append(Series(name, points, number, line=True, order=number))
    low, high, ticks = share_range([0.0, 1.0])
    own = found["judge"].get("threshold")
    chart = Chart("Threshold", Axis("threshold"), Axis("share of images", (low, high), ticks), series)
    says = "; ".join(f"{one.name} from {one.points[0].y:.2f} to {one.points[-1].y:.2f}" for one in series if one.points)
    every = curve[:: max(1, len(curve) // 20)]
    rows = [[f"{row['threshold']:.4g}", *(_percent(row[one.name]) for one in series)] for row in every]
    drawn = svg(chart, "threshold", f"By threshold: {says}.")
    table = Table(["threshold", "sensitivity", "specificity"], rows, "By threshold")
    remarks = f"The judge's own threshold is {own}." if isinstance(own, int | float) else ""
    legend = [(one.name, one.colour) for one in series]
    return [Heading("Thresholds"), Charts([ChartFigure(drawn, "By threshold", legend, remarks, table)])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
