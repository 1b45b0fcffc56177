"""Training on whole groups: from images, from a cache, with costs filled in; on pairs the losses of pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.callbacks import ResistTampering
from lit_safety.cli.precompute import precompute
from lit_safety.core.errors import UserError
from lit_safety.cost_model.fill import costs_of_labels, fill_costs
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.validate import problems
from lit_safety.modules import PSA, SCDPO, TextAdversary
from lit_safety.modules.preference import PreferenceModule
from lit_safety.modules.speed import SelectiveBackward, Speed
from lit_safety.modules.stability import Stability
from lit_safety.objectives import GDRO, NCD, DiffusionDPO, GroupDPO, Objective
from tests.helpers.pair_fits import make_trainer
from tests.helpers.pair_shards import make_image, metadata

FACTS = [{"harmful": True}, {"harmful": False}, {"harmful": True}, {"harmful": False}]


def write(folder: Path, sizes: list[int], size: int = 32, kind: str = "harmful") -> Path:
    """Groups of these sizes; 0 is a pair."""
    with ShardWriter(folder, 4) as writer:
        for number, count in enumerate(sizes):
            about = metadata(number, order="safety", prompt_kind=kind, prompt="a red cat")
            own = [make_image(number + 50 * place, size) for place in range(count or 2)]
            if count:
                del about["harmful"]
                about["images"] = FACTS[:count]
            writer.write_group(f"{number:03d}", about, own)
    return folder


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("groups"), [4, 3, 2, 0])


@pytest.fixture(scope="module")
def cached(groups: Path, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "groups"
    options: dict[str, Any] = {"dtype": "float32", "batch_size": 3, "keep_images": True, "reference_draws": 2}
    precompute(str(groups), str(tiny_pipeline), str(out), **options)
    return out


def batch_of(folder: Path, whole: bool = True, **settings: Any) -> Any:
    data = PreferenceDataModule(val=str(folder), batch_size=4, **settings)
    data.read_groups(whole)
    (batch,) = data.val_dataloader()
    return batch


@pytest.fixture
def module(tiny_pipeline: Path) -> SCDPO:
    torch.manual_seed(0)
    found = SCDPO(str(tiny_pipeline), GDRO(100.0))
    found.configure_model()
    for name, weights in found.trainable_parameters():  # a policy that has moved
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05)
    return found.eval()


@torch.no_grad()
def test_errors_of_a_group_are_those_of_its_images(module: SCDPO, groups: Path) -> None:
    """The best and the worst have the errors of the pair, and images of one group share timestep and noise."""
    whole, pairs = batch_of(groups), batch_of(groups, whole=False)
    found, of_pairs = module.errors(whole), module.errors(pairs)
    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
        torch.testing.assert_close(getattr(found, name), getattr(of_pairs, name), rtol=1e-4, atol=1e-6)
    assert found.groups is not None
    assert found.groups.policy.shape == (4, 4)
    assert found.groups.policy.ne(0).sum(1).tolist() == [4, 3, 2, 2]
    assert (found.groups.policy != found.groups.reference).sum(1).tolist() == [4, 3, 2, 2]
    noisy, timesteps, target, conditioning = module.noised(whole)
    assert len(noisy) == len(timesteps) == len(conditioning["encoder_hidden_states"]) == 11
    assert timesteps[:4].unique().numel() == 1
    assert torch.equal(target[0], target[3])
    assert not torch.equal(target[0], target[4])


@torch.no_grad()
@pytest.mark.parametrize("objective", [GDRO(100.0), GroupDPO(100.0)])
def test_on_pairs_the_step_is_that_of_diffusion_dpo(module: SCDPO, tmp_path: Path, objective: Objective) -> None:
    folder = write(tmp_path, [0, 0, 2])
    module.objective = objective
    ours = module.loss(module.errors(batch_of(folder)), batch_of(folder)).loss
    module.objective = DiffusionDPO(100.0)
    theirs = batch_of(folder, whole=False)
    torch.testing.assert_close(ours, module.loss(module.errors(theirs), theirs).loss, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_cache_of_groups_gives_what_its_images_do(
    module: SCDPO, groups: Path, cached: Path, tiny_pipeline: Path
) -> None:
    assert problems(str(cached)) == []
    found = batch_of(cached)
    assert found.groups.latents.shape[:3] == (4, 4, 2)
    assert found.groups.reference.shape == (4, 4, 1)
    without = batch_of(cached, use_reference=False)
    images = batch_of(groups)
    torch.testing.assert_close(
        module.errors(without).groups.policy, module.errors(images).groups.policy, rtol=1e-4, atol=1e-6
    )
    errors = module.errors(found)
    fresh = SCDPO(str(tiny_pipeline), GDRO(100.0))
    fresh.configure_model()
    untrained = fresh.eval().errors(found)
    torch.testing.assert_close(untrained.groups.policy, errors.groups.reference, rtol=1e-4, atol=1e-6)
    pairs = batch_of(cached, whole=False)
    assert torch.equal(pairs.reference[:, :, 0], found.groups.reference[:, :, 0].gather(1, found.groups.sides))
    rows = torch.arange(4)
    assert torch.equal(pairs.latents[:, 1], found.groups.latents[rows, found.groups.sides[:, 1]])


@pytest.mark.parametrize("from_cache", [False, True])
@pytest.mark.parametrize("objective", [NCD(100.0, safety="label", sft_weight=1.0), GDRO(100.0)])
def test_a_fit_trains_on_whole_groups(
    objective: Objective, from_cache: bool, groups: Path, cached: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """At the start rewards are 0: GDRO's loss of 4 images in two ranks, 3, 2 and a pair is known by hand."""
    folder = str(cached if from_cache else groups)
    module = SCDPO(str(tiny_pipeline), objective)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1)
    trainer.fit(module, datamodule=PreferenceDataModule(folder, val=folder, batch_size=4))
    logged = trainer.callback_metrics
    if isinstance(objective, GDRO):
        # 4 images: two safe ones, each over two harmful ones: 2 log 3; 3: log 3; 2 and the pair: log 2
        assert logged["loss"].item() == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 4, rel=1e-4)
    assert torch.isfinite(logged["val/loss"])
    assert any(weights.abs().sum() > 0 for name, weights in module.trainable_parameters() if "lora_B" in name)


def test_a_moving_reference_is_the_one_that_groups_are_compared_with(
    groups: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """It becomes the policy after every step, so rewards are 0 at each, however far training has come."""
    module = SCDPO(str(tiny_pipeline), GDRO(), stability=Stability(reference_decay=0.0))
    module.objective.tells_sizes = True
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(module, datamodule=PreferenceDataModule(str(groups), batch_size=4))
    assert trainer.callback_metrics["loss"].item() == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 4, rel=1e-4)
    assert trainer.callback_metrics["rewards/sizes"].abs().max() < 1e-3


class Counting:
    """A cost model that says how many it saw: the first image 1, the second 2, ..."""

    def costs(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(1.0, 1.0 + len(images))


def test_costs_that_a_group_lacks_are_filled_in(groups: Path) -> None:
    batch = batch_of(groups)
    assert batch.has_cost == [False] * 4
    memory: dict[str, tuple[float, ...]] = {}
    filled = fill_costs(batch, Counting(), memory)  # type: ignore[arg-type]
    assert filled.groups.cost[0].tolist() == [1, 2, 3, 4]
    assert filled.groups.cost[1, :3].tolist() == [1, 2, 3]
    assert filled.cost.tolist() == [[2, 3], [2, 3], [2, 1], [1, 2]]
    assert filled.has_cost == [True] * 4
    assert memory["001"] == (1, 2, 3)
    labels = costs_of_labels(batch)
    assert labels.groups.cost[0].tolist() == [1, -1, 1, -1]
    assert labels.cost.tolist() == [[-1, 1]] * 4
    assert batch.groups.cost.isnan().all()


def test_what_a_group_lacks_is_named_before_weights_are_loaded(
    groups: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(UserError, match="has no cost"):
        trainer.fit(SCDPO(str(tiny_pipeline), NCD()), datamodule=PreferenceDataModule(str(groups), batch_size=2))


def test_what_reads_pairs_alone_is_refused(groups: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    class Own(PreferenceModule):
        def noised(self, batch: Any) -> Any:
            return super().noised(batch)

    for made in (
        Own(str(tiny_pipeline), GDRO()),
        SCDPO(str(tiny_pipeline), GDRO(), speed=Speed(selective=SelectiveBackward())),
        SCDPO(str(tiny_pipeline), GDRO(), stability=Stability(winner_limit=0.1)),
        SCDPO(str(tiny_pipeline), GDRO(), stability=Stability(own_noise=True)),
        SCDPO(str(tiny_pipeline), GDRO(), adversary=TextAdversary()),
    ):
        with pytest.raises(UserError, match="GDRO"):
            make_trainer(tmp_path, max_steps=1).fit(made, datamodule=PreferenceDataModule(str(groups), batch_size=2))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[ResistTampering()])
    with pytest.raises(UserError, match="GDRO"):
        trainer.fit(SCDPO(str(tiny_pipeline), GDRO()), datamodule=PreferenceDataModule(str(groups), batch_size=2))
    assert PSA.ordered is not PreferenceModule.ordered


@torch.no_grad()
def test_a_step_with_masks_sees_what_they_cover(module: SCDPO, tmp_path: Path) -> None:
    """Errors of policy and reference do not depend on the image outside the mask; a full mask is like none."""
    from PIL import Image

    from lit_safety.objectives import prediction_error
    from lit_safety.objectives.objective import masked

    module.objective = DiffusionDPO(100.0)
    corner = Image.new("L", (32, 32))
    corner.paste(255, (0, 0, 16, 16))
    with ShardWriter(tmp_path) as writer:
        for number, mask in enumerate((corner, None)):
            writer.write(str(number), metadata(number), make_image(number, 32), make_image(number + 50, 32), mask=mask)
    data = PreferenceDataModule(val=str(tmp_path), batch_size=4, masked=True)
    (batch,) = data.val_dataloader()
    errors = module.errors(batch)
    noisy, timesteps, target, conditioning = module.noised(batch)
    policy = module.backbone.predict(noisy, timesteps, conditioning)
    torch.testing.assert_close(errors.policy_chosen, prediction_error(*masked(batch.mask, policy, target))[:2])
    batch.mask = None
    whole = module.errors(batch)
    assert not torch.isclose(errors.policy_chosen[0], whole.policy_chosen[0])
    torch.testing.assert_close(errors.policy_chosen[1], whole.policy_chosen[1])
    torch.testing.assert_close(errors.reference_rejected[1], whole.reference_rejected[1])
    assert not torch.isclose(errors.reference_rejected[0], whole.reference_rejected[0])
