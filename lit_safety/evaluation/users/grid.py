"""One image of what each user sees: a row a prompt, a column a user, the same initial noise along a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import GridSettings
from lit_safety.report.sheet import RED, TILE, Band, Cell, Row, sheet, veiled

if TYPE_CHECKING:
    from torch import Tensor

    from lit_safety.judges.judge import Judge


def draw_grid(
    pipe: Any,
    prompts: Sequence[str],
    users: Sequence[str | None] | Tensor,
    seeds: Sequence[int],
    batch_size: int = 8,
    tick: Callable[[int], None] | None = None,
    **options: Any,
) -> list[list[Image.Image]]:
    """Draw every prompt for every user; `rows[prompt][user]`.

    Args:
        pipe: a pipeline that `load_psa` has prepared.
        prompts: what is drawn.
        users: user ids, None for the null user; or embeddings (U, D).
        seeds: one a prompt, so that along a row only the user differs.
        batch_size: images drawn at once.
        tick: is told how many images were drawn just now.
        options: go to the pipeline's call, such as `num_inference_steps` and `guidance_scale`.
    """
    import torch

    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each prompt")
    cells = [(prompt, user) for prompt in range(len(prompts)) for user in range(len(users))]
    images: list[Image.Image] = []
    for start in range(0, len(cells), batch_size):
        batch = cells[start : start + batch_size]
        if isinstance(users, torch.Tensor):
            whose: dict[str, Any] = {"user_embeds": users[[user for _, user in batch]]}
        else:
            whose = {"user": [users[user] for _, user in batch]}
        images += pipe(
            prompt=[prompts[prompt] for prompt, _ in batch],
            generator=[torch.Generator("cpu").manual_seed(seeds[prompt]) for prompt, _ in batch],
            **whose,
            **options,
        ).images
        if tick is not None:
            tick(len(batch))
    width = len(users)
    return [images[row * width : (row + 1) * width] for row in range(len(prompts))]


def draw_plain(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 8,
    tick: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Draw every prompt with a pipeline that knows no users; arguments as in `draw_grid`."""
    import torch

    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = range(start, min(start + batch_size, len(prompts)))
        images += pipe(
            prompt=[prompts[row] for row in part],
            generator=[torch.Generator("cpu").manual_seed(seeds[row]) for row in part],
            **options,
        ).images
        if tick is not None:
            tick(len(part))
    return images


def frames(
    judge: Judge, rows: Sequence[Sequence[Image.Image]], banned: Sequence[Collection[str]]
) -> tuple[list[list[Image.Image]], list[list[bool]]]:
    """The images as they may be shown, and which of them get a red frame.

    Framed is what the judge says the column's user bans, or could not judge; blurred what it calls harmful or could not
    judge, unless its images cannot harm anybody.

    Args:
        judge: says what is in the images.
        rows: images by prompt, then by column.
        banned: what each column's user bans.
    """
    from lit_safety.judges.judge import JudgeError
    from lit_safety.judges.judging import judge_safely

    blur = not getattr(judge, "harmless", False)
    shown, red = [], []
    for row in rows:
        verdicts = judge_safely(judge, row)
        red.append(
            [isinstance(v, JudgeError) or bool(v.present & set(b)) for v, b in zip(verdicts, banned, strict=True)]
        )
        hidden = [blur and (isinstance(v, JudgeError) or v.harmful) for v in verdicts]
        shown.append([veiled(p) if veil else p for p, veil in zip(row, hidden, strict=True)])
    return shown, red


def user_grid(
    rows: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    users: Sequence[str],
    notes: Mapping[str, str] | None = None,
    tile: int = TILE,
    red: Sequence[Sequence[bool]] | None = None,
) -> Image.Image:
    """The labelled sheet.

    Args:
        rows: images by prompt, then by user.
        prompts: a label a row.
        users: a label a column.
        notes: a line below a user's label, such as what the user bans.
        tile: side of an image on the sheet in pixels; small ones are enlarged without smoothing.
        red: which images get a red frame, by prompt, then by user; None: none.

    Raises:
        UserError: there is not one image for every prompt and user.
    """
    if not prompts or not users or [len(row) for row in rows] != [len(users)] * len(prompts):
        raise UserError(f"a grid needs one image for each of {len(prompts)} prompts and {len(users)} users")
    lines = []
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        framed = red[number] if red is not None else [False] * len(row)
        cells = [Cell(image, RED if bad else None) for image, bad in zip(row, framed, strict=True)]
        lines.append(Row("", cells, prompt))
    return sheet([Band([(user, (notes or {}).get(user, "")) for user in users], lines)], tile)


# The command `users grid`: one image of what each user sees of some prompts.


NULL = "null user"
BASE = "base"


def grid(
    *,
    pipeline: str,
    adapter: str,
    users: str,
    prompts: list[str],
    out: str,
    ids: list[str | int] | None = None,
    count: int = 4,
    loras: dict[str, float] | None = None,
    base: bool = True,
    null_user: bool = True,
    judge: str | None = None,
    seed: int = 0,
    other_world: bool = False,
    **drawing: Any,
) -> None:
    """Draw some prompts for some users into one image: a row a prompt, a column a user, one seed along a row.

    Args:
        pipeline: Folder of a diffusers text-to-image pipeline, or its hub id.
        adapter: Folder or file of a user adapter, of ours or of the published layout.
        users: Folder with users.csv (profiles and lists) and users.safetensors (embeddings).
        prompts: What is drawn.
        out: The PNG file to write.
        ids: Users, a column each, in quotes: '["0000033"]'; null: `count` unseen ones (any, where the table has no
            splits) who ban as different things as can be.
        count: How many users, where no ids are given.
        loras: LoRAs in the same pipeline, folder or file -> weight.
        base: A first column without the user adapter.
        null_user: A column for the null user.
        judge: Frames in red what the judge says the column's user bans, and blurs what it calls harmful unless it knows
            that its images cannot harm anybody, as the toy world's. null: no frames, nothing is blurred.
        seed: Of the first prompt; the others count on.
        other_world: Take a judge of an embedded world, such as data/toyworld, for a pipeline that is not of this world;
            false refuses it.
        **drawing: How images are drawn, see `GridSettings`.

    Raises:
        UserError: a file or folder given is missing, unreadable or does not fit, or a user is unknown.
    """
    import io

    import torch

    from lit_safety.adapters.user_pipeline import load_psa
    from lit_safety.core.categories import CATEGORIES
    from lit_safety.core.files import write_atomic
    from lit_safety.core.progress import progress
    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.pipelines import check_writable, load_pipeline, local_pipeline
    from lit_safety.drawing.worlds import check_world
    from lit_safety.evaluation.users.rows import choose_users
    from lit_safety.judges.judge import check_sees
    from lit_safety.judges.load import load_judge
    from lit_safety.users.profiles import PROFILES_FILE, read_profiles
    from lit_safety.users.table import Users

    if not prompts:
        raise UserError("--prompts: name at least one")
    how = GridSettings(workers=None, edit=None, **drawing)
    check_writable(Path(out).parent)
    profiles = read_profiles(Path(users) / PROFILES_FILE)
    embeddings = Users(users)
    if ids is None:
        bans = {user: one.banned for user, one in profiles.items() if one.split in ("unseen", "")}
        named = different_users(bans, count)
    else:
        named = [one.user_id for one in choose_users(profiles, [], None, ids, str(Path(users) / PROFILES_FILE))]
    embeddings.embeddings(named)
    arm = Arm(adapters=loras)
    arm.check("grid")
    folder = local_pipeline(pipeline)
    check_world(folder, {"--judge": judge}, other_world)
    looks = load_judge(judge) if judge is not None else None
    if looks is not None:
        check_sees(looks, [category for user in named for category in profiles[user].banned], f"--users {users}")
    device = how.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(folder, arm, device, how.precision)
    seeds = [seed + number for number in range(len(prompts))]
    options: dict[str, Any] = {"num_inference_steps": how.steps, "guidance_scale": how.guidance}
    options |= {"height": how.resolution, "width": how.resolution}
    whom: list[str | None] = [*([None] if null_user else []), *named]
    with progress("draw", len(prompts) * (len(whom) + base)) as tick:
        drawn = [draw_plain(pipe, prompts, seeds, how.batch_size, tick, **options)] if base else []
        load_psa(pipe, adapter, users=embeddings.file)
        rows = draw_grid(pipe, prompts, whom, seeds, how.batch_size, tick, **options)
    rows = [[*(column[number] for column in drawn), *row] for number, row in enumerate(rows)]
    labels = [*([BASE] if base else []), *([NULL] if null_user else []), *(f"user {user}" for user in named)]
    notes = {f"user {user}": _note(profiles[user].banned) for user in named} | {NULL: "nobody known"}
    banned = [*([()] if base else []), *([CATEGORIES] if null_user else []), *(profiles[user].banned for user in named)]
    shown, red = frames(looks, rows, banned) if looks is not None else (rows, None)
    image = io.BytesIO()
    user_grid(shown, prompts, labels, notes, red=red).save(image, "PNG")
    print(f"grid: {write_atomic(Path(out), image.getvalue())}")


def different_users(banned: dict[str, tuple[str, ...]], count: int) -> list[str]:
    """`count` users, each of whom bans as different things as can be from those before; the same every time.

    The first one bans most without banning all; then whoever differs in most categories from the nearest one chosen.

    Raises:
        UserError: there are none.
    """
    if not banned or count < 1:
        raise UserError("there are no unseen users to choose from: name some by --ids")
    chosen: list[str] = []
    while len(chosen) < min(count, len(banned)):
        left = [user for user in banned if user not in chosen]
        if chosen:
            distance = {u: min(len(set(banned[u]) ^ set(banned[one])) for one in chosen) for u in left}
        else:
            most = max(map(len, banned.values()))
            distance = {u: len(banned[u]) if len(banned[u]) < most or most < 8 else 0 for u in left}
        chosen.append(max(left, key=lambda user: distance[user]))  # the first of equals
    return chosen


def _note(banned: tuple[str, ...]) -> str:
    return f"bans {', '.join(banned)}" if banned else "bans nothing"
