"""The command `users grid`: one picture of what each user sees of some prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_safety.errors import UserError

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
    steps: int = 20,
    guidance: float = 3.0,
    resolution: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    precision: Literal["float32", "float16", "bfloat16"] = "float32",
    other_world: bool = False,
) -> None:
    """Draw some prompts for some users into one picture: a row a prompt, a column a user, one seed along a row.

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
            that its pictures cannot harm anybody, as the toy world's. null: no frames, nothing is blurred.
        seed: Of the first prompt; the others count on.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        resolution: Side of the pictures in pixels; null is the pipeline's own.
        batch_size: Pictures drawn at once.
        device: Where to draw, such as cpu or cuda:1; null takes cuda where there is one.
        precision: Number format of the weights while drawing.
        other_world: Take a judge of an embedded world, such as data/toyworld, for a pipeline that is not of this world;
            false refuses it.

    Raises:
        UserError: a file or folder given is missing, unreadable or does not fit, or a user is unknown.
    """
    import io

    import torch

    from lit_safety.adapters.psa_pipeline import load_psa
    from lit_safety.data.atomic import write_atomic
    from lit_safety.data.categories import CATEGORIES
    from lit_safety.data.progress import progress
    from lit_safety.data.users import Users
    from lit_safety.evaluation.arms import Arm
    from lit_safety.evaluation.drawing import DrawingSettings
    from lit_safety.evaluation.judges import check_sees, load_judge
    from lit_safety.evaluation.pipelines import check_writable, load_pipeline, local_pipeline
    from lit_safety.evaluation.user_grid import draw_grid, draw_plain, frames, user_grid
    from lit_safety.evaluation.user_rows import choose_users
    from lit_safety.evaluation.worlds import check_world
    from lit_safety.users.profiles import PROFILES_FILE, read_profiles

    if not prompts:
        raise UserError("--prompts: name at least one")
    DrawingSettings(steps, guidance, resolution, batch_size)
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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(folder, arm, device, precision)
    seeds = [seed + number for number in range(len(prompts))]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": resolution, "width": resolution}
    whom: list[str | None] = [*([None] if null_user else []), *named]
    with progress("draw", len(prompts) * (len(whom) + base)) as tick:
        drawn = [draw_plain(pipe, prompts, seeds, batch_size, tick, **options)] if base else []
        load_psa(pipe, adapter, users=embeddings.file)
        rows = draw_grid(pipe, prompts, whom, seeds, batch_size, tick, **options)
    rows = [[*(column[number] for column in drawn), *row] for number, row in enumerate(rows)]
    labels = [*([BASE] if base else []), *([NULL] if null_user else []), *(f"user {user}" for user in named)]
    notes = {f"user {user}": _note(profiles[user].banned) for user in named} | {NULL: "nobody known"}
    banned = [*([()] if base else []), *([CATEGORIES] if null_user else []), *(profiles[user].banned for user in named)]
    shown, red = frames(looks, rows, banned) if looks is not None else (rows, None)
    picture = io.BytesIO()
    user_grid(shown, prompts, labels, notes, red=red).save(picture, "PNG")
    print(f"grid: {write_atomic(Path(out), picture.getvalue())}")


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
