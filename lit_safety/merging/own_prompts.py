"""The prompts on which the layers' inputs are measured: each expert's own, and those of what must stay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.data.reading.select import Filter, take
from lit_safety.data.reading.source import open_source
from lit_safety.drawing.prompts import read_prompts
from lit_safety.drawing.worlds import refuse_reports_own
from lit_safety.merging.calibration import KEY, read_shards
from lit_safety.merging.options import NEED_NOTHING, CalibrationOptions, Recipe

FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt")
"""Endings of prompt files; anything else is read as shards."""


@dataclass(frozen=True)
class OwnPrompts:
    """Prompts by what is measured with them."""

    own: Mapping[str, Sequence[str]]
    """Prompts by expert; empty if only the base is measured."""
    clean: Sequence[str]

    def all(self) -> set[str]:
        """All prompts."""
        return {*chain.from_iterable(self.own.values()), *self.clean}


def own_prompts(
    source: str | Sequence[str],
    experts: Sequence[str],
    recipe: Recipe,
    options: CalibrationOptions,
    clean: Sequence[str] | None = None,
) -> OwnPrompts:
    """Different prompts: ``options.each`` of each expert's category, and ``clean`` or ``options.clean`` clean ones.

    The choice does not depend on the order in the file. Kinds (explicit, implicit; clean, look-alike) are taken in
    equal parts as far as possible. Rows marked held_out are left out.

    Raises:
        UserError: the source cannot be read, an expert has no category, or there is no prompt for an expert or no clean
            prompt.
    """
    categories = categories_of(experts, options) if recipe.own_inputs else {}
    files = files_of(experts, options) if recipe.own_inputs else {}
    refuse_reports_own([*([source] if isinstance(source, str) else source), *files.values()], KEY)
    harmful, harmless = _of_file(source) if _is_file(source) else _of_shards(source)
    own = {name: first_prompts(harmful.get(category, []), options.each) for name, category in categories.items()}
    own |= {name: first_prompts(_all_of(file), options.each) for name, file in files.items()}
    kept = first_prompts(harmless, options.clean) if clean is None else list(clean)
    for name, prompts in own.items():
        if not prompts and name in files:
            raise UserError(f"--calibration.of: {files[name]} holds no prompt for the expert {name}")
        if not prompts:
            raise _missing_prompts(
                source, f"harmful prompt of {categories[name]}, the category of the expert {name}", recipe
            )
    if not kept:
        raise _missing_prompts(source, "clean or look-alike prompt", recipe)
    return OwnPrompts(own, kept)


def check_own_prompts(
    source: str | Sequence[str], experts: Sequence[str], recipe: Recipe, options: CalibrationOptions
) -> None:
    """Refuse a source in which `own_prompts` would find too little. Of shards only the manifest is read.

    Raises:
        UserError: as `own_prompts`.
    """
    categories = categories_of(experts, options) if recipe.own_inputs else {}
    if _is_file(source) or files_of(experts, options):
        own_prompts(source, experts, recipe, options)
        return
    refuse_reports_own(source, KEY)
    shards = open_source(source, KEY)
    for name, category in categories.items():
        if not take(shards, Filter(categories=(category,), kinds=("harmful",))).total:
            raise _missing_prompts(source, f"harmful prompt of {category}, the category of the expert {name}", recipe)
    if not take(shards, Filter(kinds=("clean",))).total:
        raise _missing_prompts(source, "clean prompt", recipe)


def categories_of(experts: Sequence[str], options: CalibrationOptions) -> dict[str, str]:
    """The category of each expert: from `--calibration.of`, or else its name. An expert with its own file has none.

    Raises:
        UserError: an expert has neither, or `--calibration.of` names an unknown expert.
    """
    named = options.of or {}
    if unknown := sorted(set(named) - set(experts)):
        raise UserError(f"--calibration.of names {unknown[0]}, but the experts are {', '.join(experts)}")
    found = {}
    files = files_of(experts, options)
    for name in experts:
        if name in files:
            continue
        try:
            found[name] = canonical_category(named.get(name, name))
        except UserError as error:
            if name in named:
                raise UserError(f"--calibration.of: {error}") from error
            raise UserError(
                f"regmean measures each expert on its own category's prompts, but {name} is not a category: name the "
                f'expert by it, such as violence=FOLDER, give --calibration.of \'{{"{name}": "violence"}}\' or, for an '
                f"expert of something else, give its own prompt file there, or use --method {NEED_NOTHING}"
            ) from error
    return found


def files_of(experts: Sequence[str], options: CalibrationOptions) -> dict[str, str]:
    """The prompt files that `--calibration.of` gives to experts; all prompts of a file are the expert's own."""
    return {name: said for name, said in (options.of or {}).items() if name in experts and said.endswith(FILES)}


def _missing_prompts(source: str | Sequence[str], what: str, recipe: Recipe) -> UserError:
    asks = "regmean" if recipe.own_inputs else "--null_space"
    return UserError(
        f"{KEY} {source}: holds no {what}, which {asks} needs; add some (a prompt file with the columns prompt, kind "
        f"and category), or use --method {NEED_NOTHING}, which needs none"
    )


def _is_file(source: str | Sequence[str]) -> bool:
    return isinstance(source, str) and source.endswith(FILES) and Path(source).name != "manifest.json"


Found = tuple[dict[str, list[tuple[str, str]]], list[tuple[str, str]]]
"""(kind, prompt) by category, and (kind, prompt) of what must stay."""


def _of_file(source: Any) -> Found:
    try:
        rows = read_prompts(source)
    except UserError as error:
        raise UserError(f"{KEY} {error}") from error
    harmful: dict[str, list[tuple[str, str]]] = {}
    clean: list[tuple[str, str]] = []
    for row in rows:
        if row.held_out:
            continue
        if not row.harmful:
            clean.append((row.kind, row.prompt))
        for category in (row.category, *row.also) if row.harmful else ():
            harmful.setdefault(category, []).append((row.kind, row.prompt))
    return harmful, clean


def _all_of(file: str) -> list[tuple[str, str]]:
    try:
        return [(row.kind, row.prompt) for row in read_prompts(file) if not row.held_out]
    except UserError as error:
        raise UserError(f"--calibration.of: {error}") from error


def _of_shards(source: str | Sequence[str]) -> Found:
    harmful: dict[str, list[tuple[str, str]]] = {}
    clean = []
    shards = open_source(source, KEY)
    for metadata in read_shards(shards, take(shards, Filter())):
        prompt = metadata.prompt.strip()
        if not prompt:
            continue
        if metadata.prompt_kind == "clean":
            clean.append(("clean", prompt))
        for category in metadata.categories if metadata.prompt_kind == "harmful" else ():
            harmful.setdefault(category, []).append(("harmful", prompt))
    return harmful, clean


def first_prompts(found: Iterable[tuple[str, str]], count: int) -> list[str]:
    """The first ``count`` different prompts in the order of their hashes, taken from the kinds in turn."""
    kinds: dict[str, set[str]] = {}
    for kind, prompt in found:
        kinds.setdefault(kind, set()).add(prompt)
    columns = [sorted(kinds[kind], key=_rank) for kind in sorted(kinds)]
    dealt = [prompt for prompt in chain.from_iterable(zip_longest(*columns)) if prompt is not None]
    return list(dict.fromkeys(dealt))[:count]


def _rank(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
