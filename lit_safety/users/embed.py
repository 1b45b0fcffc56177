"""`lit_safety users embed`: profiles to embeddings."""

from __future__ import annotations


def embed(
    profiles: str,
    out: str | None = None,
    model: str | None = None,
    template: str | None = None,
    none_as_nan: bool = False,
    dimension: int = 64,
    batch_size: int = 8,
    device: str | None = None,
) -> None:
    """Write users.safetensors: an embedding for every user of a table.

    With `--model Qwen/Qwen2.5-7B-Instruct` as published: the mean of the model's last hidden state over the text of the
    profile. Without a model: a fixed random projection of the profile's traits and bans, the toy world's default. All
    users of a training, and all users of later drawings, must be embedded in the same way.

    Args:
        profiles: users.csv, or the folder that holds it. The published table can be used unchanged.
        out: The folder to write users.safetensors to; null: the table's own.
        model: A text model: a folder or a hub id, loaded by transformers; null: no model.
        template: A text with the fields <<AGE>>, <<AGE_GROUP>>, <<GENDER>>, <<RELIGION>>, <<PHYSICAL>>, <<MENTAL>>,
            <<BANNED>>, <<ALLOWED>> (lists as published, so that the published template gives the published text),
            <<BANNED_WORDS>>, <<ALLOWED_WORDS>>; null: the package's own. Only used with a model.
        none_as_nan: Write `nan` for a trait that is "None" (a user without religion), as in the published texts. Use it
            with the published template for embeddings of published adapters. Only used with a model.
        dimension: Length of an embedding without a model; a model has its own length.
        batch_size: How many profiles a model reads at once.
        device: The device of the model, such as cuda; null: a GPU if there is one.
    """
    from pathlib import Path

    from lit_safety.core.errors import UserError
    from lit_safety.core.progress import counter
    from lit_safety.users.embeddings import fill, project, read_template
    from lit_safety.users.profiles import PROFILES_FILE, read_profiles
    from lit_safety.users.table import write_users

    users = read_profiles(profiles)
    if batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {batch_size}")
    table = Path(profiles) / PROFILES_FILE if Path(profiles).is_dir() else Path(profiles)
    if model is None:
        if template is not None:
            raise UserError("--template is only for a text model: give --model too")
        if none_as_nan:
            raise UserError("--none_as_nan is only for a text model: give --model too")
        embeddings = project(users.values(), dimension)
    else:
        from lit_safety.users.embeddings import TextModel

        text = read_template(template)
        with counter("embed", len(users)) as tick:
            embeddings = TextModel(model, device).embed(
                {user: fill(text, profile, none_as_nan) for user, profile in users.items()}, batch_size, tick
            )
    path = write_users(Path(out) if out is not None else table.parent, embeddings)
    print(f"{path}: {len(embeddings)} users, {len(next(iter(embeddings.values())))} numbers each")
