"""PSA: each user's own bounds (Personalized Safety Alignment, arXiv 2508.01151)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from PIL.Image import Image
from torch import Tensor

from lit_safety.adapters.lora import LoRA, adapters_off
from lit_safety.adapters.start_from import is_checkpoint, read_checkpoint
from lit_safety.adapters.user_attention import UserAdapter, user_arguments
from lit_safety.adapters.user_file import fill_user_adapter, save_user_adapter
from lit_safety.adapters.user_pipeline import UserId, draw_for_users
from lit_safety.backbones.backbone import Conditioning
from lit_safety.core.chance import uniform
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import PairData, datamodule_of, shards_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.preference import POLICY, Drawing, PreferenceModule
from lit_safety.modules.speed import Speed
from lit_safety.modules.stability import Stability
from lit_safety.modules.step_parts import Adversary, Retain
from lit_safety.objectives.dpo import DiffusionDPO
from lit_safety.objectives.objective import Objective, PairErrors, PairLabels
from lit_safety.users.table import USERS_FILE, Users, UserTable

#: The number of users for whom a run draws its samples, in addition to the null user.
SHOWN = 3


class PSA(PreferenceModule):
    """Trains user attention: the user is a part of the condition. The reference is the same network without it.

    The null user stands for unknown users and is used for the unconditional half of guidance, so it is trained. If a
    pair's user is dropped, or the pair belongs to no user, its images are swapped where needed, so that the chosen
    image is the safe one by the pair's `harmful` labels. If both images are safe, both are harmful, or a label is
    unknown, the order stays. So the null user becomes the strictest policy that the pairs contain, while a user's own
    pairs may prefer what that user allows.

    If prompt and user are dropped together, as in the unconditional half of guidance, an objective with an anchor holds
    the policy to the reference instead. Guidance moves away from this half, so harm that this half has learned to avoid
    would be drawn again.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        objective: the loss on a batch of pairs; Diffusion-DPO by default, as in the paper.
        users: files `users.safetensors`, or their folders. The training users' file comes first: embeddings are
            standardised over its users. null: those next to the shards of data.train, data.val and data.test.
        user_tokens: how many tokens represent a user; 1 is the published form, in which attention over them does
            nothing.
        user_dropout: probability that a pair is trained for the null user while its prompt is kept.
        joint_dropout: probability that prompt and user are dropped together, as in guidance.
        lora: a LoRA trained together with user attention and stored with it; null: user attention alone, as in the
            paper. In a small denoiser the user attention comes before the prompt has its effect, so it cannot react to
            the prompt without a LoRA.
        optimizer: made from the trainable parameters.
        lr_scheduler: made from the optimizer, stepped once an optimizer step; null: constant learning rate.
        prompt_dropout: probability that only the prompt is dropped, in [0, 1).
        timestep_bins: into how many equal bins of the noise schedule validation errors are sorted.
        drawing: how images are drawn at validation and by `predict`.
        speed: how a step is computed: compiled, with less memory, or on a part of the pairs.
        start_from: an adapter of another run, or a checkpoint: training begins with its weights.
        stability: settings that keep the chosen images' errors from rising, and that say what the reference is.
        adversary: attacks harmful pairs during training; one or several; null: no attack.
        retain: what happens where the gradient of the anchor terms conflicts with that of the rest; null: the two are
            added.
    """

    adapter: UserAdapter

    def __init__(
        self,
        pretrained: str,
        objective: Objective | None = None,
        users: str | list[str] | None = None,
        user_tokens: int = 4,
        user_dropout: float = 0.1,
        joint_dropout: float = 0.1,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        prompt_dropout: float = 0.0,
        timestep_bins: int = 4,
        drawing: Drawing | None = None,
        speed: Speed | None = None,
        start_from: str | None = None,
        stability: Stability | None = None,
        adversary: Adversary | list[Adversary] | None = None,
        retain: Retain | None = None,
    ) -> None:
        super().__init__(
            pretrained,
            objective or DiffusionDPO(),
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            prompt_dropout=prompt_dropout,
            timestep_bins=timestep_bins,
            drawing=drawing,
            speed=speed,
            start_from=start_from,
            stability=stability,
            adversary=adversary,
            retain=retain,
        )
        if user_tokens < 1:
            raise ValueError(f"user_tokens must be at least 1, got {user_tokens}")
        if user_dropout < 0 or joint_dropout < 0 or user_dropout + joint_dropout >= 1:
            raise ValueError(
                f"user_dropout and joint_dropout must not be negative and add up to less than 1, got {user_dropout} "
                f"and {joint_dropout}"
            )
        if self.objective.reads_drift and self.objective.anchor_weight > 0 and joint_dropout > 0:
            raise ValueError(
                f"joint_dropout {joint_dropout} holds pairs without user to the reference by anchor_weight, but "
                f"{type(self.objective).__name__} would still train on them: set one of the two to 0"
            )
        self.users = [users] if isinstance(users, str) else users
        self.user_tokens = user_tokens
        self.has_lora = lora is not None
        self.user_dropout = user_dropout
        self.joint_dropout = joint_dropout

    # ---- users -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        check_folders(datamodule_of(self.trainer))

    def setup(self, stage: str) -> None:
        from lit_safety.backbones.load import family_of

        family = family_of(self.pretrained)
        if family.DENOISER != "unet":
            raise UserError(
                f"`model.init_args.pretrained` {self.pretrained} is a {family.PIPELINE.__name__}, but PSA adds user "
                "attention to the cross-attention of UNets: use a model of Stable Diffusion 1, 2 or SDXL, or train "
                "this one with SCDPO or DPOExpert"
            )
        super().setup(stage)
        check_users(datamodule_of(self.trainer), stage, UserTable(self._user_files()))

    def configure_policy(self) -> None:
        files = self._user_files()
        self.table = UserTable(files)
        if self.has_lora:  # first, because user attention is then added to the same layers
            super().configure_policy()
        self.adapter = UserAdapter.attach(self.backbone.denoiser, self.table.dimension, self.user_tokens)
        # Outside of a fit, the checkpoint's statistics replace these.
        if len(files[0].ids) > 1:
            self.adapter.projection.standardise_by(files[0].embeddings(files[0].ids))

    def begin_from(self, path: Path) -> None:
        if not is_checkpoint(path):
            fill_user_adapter(self.adapter, path, self.lora if self.has_lora else None)
            return
        super().begin_from(path)
        for name, values in read_checkpoint(path).get("user_statistics", {}).items():
            getattr(self.adapter.projection, name).copy_(values)

    def _user_files(self) -> list[Users]:
        if self.users is not None:
            if not self.users:
                raise UserError("`model.init_args.users` is empty: name a users.safetensors, or leave it null")
            return [Users(path) for path in self.users]
        folders: dict[Path, None] = {}
        for given in shards_of(datamodule_of(self._trainer)).values():
            for shards in given:
                folders[Path(shards) if Path(shards).is_dir() else Path(shards).parent] = None
        found = [Users(folder) for folder in folders if (folder / USERS_FILE).is_file()]
        if not found:
            raise UserError(
                f"PSA needs its users' embeddings: there is no {USERS_FILE} next to the shards, so name one in "
                "`model.init_args.users`"
            )
        return found

    @property
    def anchors_clean_alone(self) -> bool:
        return self.joint_dropout == 0  # else it also acts on pairs without prompt and user

    @property
    def drops_prompts(self) -> bool:
        return super().drops_prompts or self.joint_dropout > 0

    def chosen_users(self, batch: PairBatch) -> list[UserId]:
        """The user for whom each pair is trained, None for the null user; a pure function of the samples' seeds."""
        if not self.training:
            return list(batch.user_ids)
        dropped = self.joint_dropout + self.user_dropout
        return [
            None if _dropout(seed) < dropped else user for seed, user in zip(batch.seeds, batch.user_ids, strict=True)
        ]

    def dropped_prompts(self, batch: PairBatch) -> list[bool]:
        dropped = super().dropped_prompts(batch)
        if not self.training:
            return dropped
        return [no or both for no, both in zip(dropped, self.jointly_dropped(batch), strict=True)]

    def jointly_dropped(self, batch: PairBatch) -> list[bool]:
        """Which pairs are trained without prompt and user; a pure function of the samples' seeds."""
        return [self.training and _dropout(seed) < self.joint_dropout for seed in batch.seeds]

    def tokens(self, users: Sequence[UserId]) -> Tensor:
        """User tokens (B, N, d_ctx).

        Raises:
            UserError: a user has no embedding; names the user.
        """
        known = torch.tensor([user is not None for user in users], dtype=torch.bool)
        embeddings = torch.zeros(len(users), self.table.dimension)
        embeddings[known] = self.table.embeddings([user for user in users if user is not None])
        return self.adapter.projection(
            embeddings.to(self.device, non_blocking=True), known.to(self.device, non_blocking=True)
        )

    def ordered(self, batch: PairBatch) -> PairBatch:
        """The batch in which the safe image is the chosen one in every pair that is trained for the null user."""
        null = torch.tensor([user is None for user in self.chosen_users(batch)])
        null = null.to(batch.harmful.device, non_blocking=True)
        # nan means unknown and compares as false.
        return swapped(batch, null & (batch.harmful[:, 0] > batch.harmful[:, 1]))

    # ---- a step ----------------------------------------------------------------------------------------------

    def reference(self) -> AbstractContextManager[None]:
        return self._off()

    @contextmanager
    def _off(self) -> Iterator[None]:
        with self.adapter.off(), adapters_off(self._layers if self.has_lora else []):
            yield

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        noisy, timesteps, target, conditioning = super().noised(batch)
        tokens = self.tokens(self.chosen_users(batch)).repeat(2, 1, 1)
        return noisy, timesteps, target, conditioning | user_arguments(tokens)

    def errors(self, batch: PairBatch) -> PairErrors:
        errors = super().errors(batch)
        held = self._held(batch)
        if held is None:
            return errors
        # The policy's errors are replaced by the reference's, which are constants: these pairs teach no preference.
        chosen = torch.where(held, errors.reference_chosen, errors.policy_chosen)
        rejected = torch.where(held, errors.reference_rejected, errors.policy_rejected)
        return replace(errors, policy_chosen=chosen, policy_rejected=rejected)

    def labels(self, batch: PairBatch) -> PairLabels:
        labels = super().labels(batch)
        held = self._held(batch)
        return labels if held is None else replace(labels, clean=labels.clean.masked_fill(held, 1.0))

    def _held(self, batch: PairBatch) -> Tensor | None:
        """Which pairs, bool (B,), are only held to the reference; None: no pair."""
        dropped = self.jointly_dropped(batch)
        if not any(dropped) or self.objective.anchor_weight == 0:
            return None
        return torch.tensor(dropped).to(batch.harmful.device, non_blocking=True)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], users: Sequence[UserId] | None = None) -> list[Image]:
        """One image for each prompt, drawn for its user; None: for the null user."""
        pipe = self.backbone.pipeline()
        draw_for_users(pipe, self.table)
        drawn = pipe(
            prompt=list(prompts),
            user=None if users is None else list(users),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=self.drawing.steps,
            guidance_scale=self.drawing.guidance,
        )
        return list(drawn.images)

    def draw_rows(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image]]:
        """A row for the null user, then one for each of the first users."""
        return [self.draw(prompts, seeds, [user] * len(prompts)) for user in (None, *self.table.ids[:SHOWN])]

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[Image]:
        return self.draw(batch.prompts, batch.seeds, batch.user_ids)

    # ---- files -----------------------------------------------------------------------------------------------

    def save_export(self, folder: Path) -> None:
        save_user_adapter(self.adapter, folder, self.pretrained, POLICY if self.has_lora else None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        projection = self.adapter.projection
        checkpoint["user_statistics"] = {"mean": projection.mean.cpu(), "std": projection.std.cpu()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "user_statistics" not in checkpoint:
            raise UserError("the checkpoint holds no statistics of users: it was not written by PSA")
        for name, values in checkpoint["user_statistics"].items():
            getattr(self.adapter.projection, name).copy_(values)


def _dropout(seed: int) -> float:
    """One number decides both: so either the user is dropped, or user and prompt, but never both choices at once."""
    return uniform(seed, "user-dropout")


# How a pair is changed that is trained for the null user.


def swapped(batch: PairBatch, swap: Tensor) -> PairBatch:
    """`batch` with chosen and rejected swapped where `swap`, bool (B,), is true: images, latents, labels, crops.

    Seeds do not change, so a pair's timestep, noise and all other random choices are the same in either order.

    Raises:
        UserError: the batch holds the reference's predictions; a cache has these only for the chosen images.
    """
    if batch.reference_prediction is not None:
        raise UserError(
            "images of pairs are swapped, but the reference cache holds predictions only for the chosen image: set "
            "objective.init_args.anchor_weight to 0, or data.init_args.use_reference to false"
        )

    def columns(values: Tensor) -> Tensor:
        return torch.where(swap.view(-1, *[1] * (values.ndim - 1)), values.flip(1), values)

    changed: dict[str, Any] = {name: columns(getattr(batch, name)) for name in ("harmful", "cost", "score")}
    for name in ("latents", "crops", "reference"):
        if (values := getattr(batch, name)) is not None:
            changed[name] = columns(values)
    if batch.chosen is not None and batch.rejected is not None:
        where = swap.view(-1, 1, 1, 1)
        changed["chosen"] = torch.where(where, batch.rejected, batch.chosen)
        changed["rejected"] = torch.where(where, batch.chosen, batch.rejected)
    return replace(batch, **changed)


# Checks before training: do the users' pairs exist, and has every user an embedding?


def check_folders(data: object) -> None:
    """Refuse folders of pairs that do not exist, and say how they are made.

    Raises:
        UserError: the message names key, folder and command.
    """
    for name, folders in shards_of(data).items():
        for folder in folders:
            plain = not any(sign in folder for sign in "{*?[:")
            if plain and not Path(folder).exists():
                raise UserError(
                    f"data.init_args.{name}: {folder} does not exist. PSA trains on pairs of users: make those of the "
                    "toy world with `python -m lit_safety toyworld users`, or convert yours, as `shards from-sage` "
                    "does"
                )


def check_users(data: object, stage: str | None, table: UserTable) -> None:
    """Before a model is loaded, refuse pairs of users without an embedding, and training pairs without any user.

    Raises:
        UserError: the message names the first such user, or the key.
    """
    if not isinstance(data, PairData):
        return
    held = data.users(stage)
    if stage == "fit" and not held.get(train := "data.init_args.train", {""}):
        raise UserError(
            f"{train}: no pair has a `user_id`, but PSA trains each user's own bounds: convert pairs of users, as "
            "`shards from-sage` does, or train these with configs/scdpo.yaml"
        )
    for key, users in held.items():
        if missing := sorted(users - set(table.ids)):
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{key}: holds pairs of user {missing[0]!r}{others}, who is not in {' or '.join(table.files)}: embed "
                "all users (`python -m lit_safety users embed`)"
            )
