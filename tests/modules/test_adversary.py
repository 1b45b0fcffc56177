"""Adversaries of a step: the arithmetic of their search, what chance decides, what is remembered, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_safety.core.chance import normal, uniform
from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import SCDPO, HiddenAdversary, SelectiveBackward, TextAdversary
from lit_safety.modules.adversaries import Memory, _encoders, _soft_tokens
from lit_safety.modules.attacked_prediction import Attack, Moved, predict_attacked
from lit_safety.modules.speed import Speed
from lit_safety.objectives.objective import prediction_error
from tests.helpers.batches import batch_of
from tests.helpers.flow_pipelines import save_flow
from tests.helpers.strategies_cpu import DeepSpeedCPU

HIDDEN = "encoder_hidden_states"


class Linear:
    """A network whose prediction is the text itself, which makes a search's answer one that can be written down."""

    backbone: Any
    global_step = 0

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(predict=lambda noisy, t, given: given[HIDDEN])

    def dropped_prompts(self, batch: PairBatch) -> list[bool]:
        return [False] * len(batch)


def linear(text: list[float], target: list[float], *parts: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction for one harmful pair, chosen and rejected, (2, 1, numbers)."""
    given = {HIDDEN: torch.tensor([text] * 2).unsqueeze(1)}
    wanted = torch.tensor([target] * 2).unsqueeze(1)
    return predict_attacked(Linear(), parts, batch_of([0]), (torch.zeros(2, 1, 2), torch.zeros(2), wanted, given))


def test_two_sign_steps_by_hand():
    """Text (1, 3) of deviation sqrt 2; targets below and above. d goes -0.6, -1.2 and +0.6, +1.2, each cut at 1: the
    text becomes (1 - sqrt 2, 3 + sqrt 2), of chosen and rejected alike, and errors are means of squares."""
    policy, logs = linear([1.0, 3.0], [-9.0, 9.0], TextAdversary(radius=1.0, steps=2, step=0.6, share=1.0))
    expected = torch.tensor([1 - 2**0.5, 3 + 2**0.5])
    torch.testing.assert_close(policy, expected.expand(2, 1, 2))
    assert float(logs["adversary/error_before"]) == pytest.approx((10**2 + 6**2) / 2)
    assert float(logs["adversary/error_after"]) == pytest.approx(((10 - 2**0.5) ** 2 + (6 - 2**0.5) ** 2) / 2)


def test_a_step_that_goes_too_far_comes_back():
    """Text (1, 3), target (1.5, 3.5): +0.6 sqrt 2 = +0.849 is past it, so the second step goes back to the text."""
    policy, _ = linear([1.0, 3.0], [1.5, 3.5], TextAdversary(radius=1.0, steps=2, step=0.6, share=1.0))
    torch.testing.assert_close(policy, torch.tensor([[[1.0, 3.0]]] * 2))
    policy, _ = linear([1.0, 3.0], [1.5, 3.5], TextAdversary(radius=1.0, steps=1, step=0.6, share=1.0))
    torch.testing.assert_close(policy, torch.tensor([[[1 + 0.6 * 2**0.5, 3 + 0.6 * 2**0.5]]] * 2))


def test_two_adversaries_add_up_and_each_takes_its_own_steps():
    """.6 and, in two steps of 0.1, 0.2, each in units of what it finds: the second finds the first one's text."""
    parts = TextAdversary(steps=1, step=0.6, share=1.0), TextAdversary(steps=2, step=0.1, share=1.0)
    policy, _ = linear([1.0, 3.0], [-9.0, 9.0], *parts)
    once = torch.tensor([1 - 0.6 * 2**0.5, 3 + 0.6 * 2**0.5])
    torch.testing.assert_close(policy[0, 0], once + torch.tensor([-0.2, 0.2]) * once.std())


def test_the_better_of_two_starts_counts():
    """With a step of almost nothing, the end is the start; the lower error of the two wins."""
    errors = []
    for restarts in (1, 2, 6):
        part = TextAdversary(radius=5.0, steps=1, step=1e-6, share=1.0, start=1.0, restarts=restarts)
        errors.append(float(linear([1.0, 3.0], [-9.0, 9.0], part)[1]["adversary/error_after"]))
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < errors[0]
    seed = batch_of([0]).seeds
    starts = torch.stack([normal(seed, f"adversary-0-start-{k}-{HIDDEN}", (1, 2))[0, 0] for k in range(6)])
    ends = torch.tensor([1.0, 3.0]) + starts * 2**0.5
    best = (ends - torch.tensor([-9.0, 9.0])).square().mean(1).min()
    assert errors[2] == pytest.approx(float(best), rel=1e-4)


def test_radius_and_step_grow():
    part = TextAdversary(grow=4)
    assert [part.scale(step) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert TextAdversary().scale(0) == 1.0


# ---- in a real step


def ready(pipeline: Path, *parts: Any, **settings: Any) -> SCDPO:
    """A module in training whose adapter was moved a little."""
    torch.manual_seed(0)  # of the fresh adapter
    module = SCDPO(str(pipeline), adversary=list(parts) or None, **settings)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in module.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for part in parts:
        part.check(module.backbone, [])
    return module.train()


def everywhere(**settings: Any) -> list[Any]:
    return [
        TextAdversary(tokens=2, start=0.1, **settings),
        TextAdversary(**settings),
        HiddenAdversary(["attn2"], **settings),
    ]


@pytest.mark.parametrize("number", range(3))
def test_each_place_lowers_the_error_of_attacked_pairs_and_leaves_the_reference_alone(tiny_pipeline: Path, number: int):
    plain = ready(tiny_pipeline).errors(batch_of([0, 1, 2, 3]))
    found = ready(tiny_pipeline, everywhere(share=1.0, noise=0.0)[number]).errors(batch_of([0, 1, 2, 3]))
    assert torch.equal(found.reference_chosen, plain.reference_chosen)
    assert torch.equal(found.reference_rejected, plain.reference_rejected)
    assert bool((found.policy_rejected[[0, 2]] < plain.policy_rejected[[0, 2]]).all())
    assert bool((found.policy_chosen[[0, 2]] != plain.policy_chosen[[0, 2]]).all())
    torch.testing.assert_close(found.policy_rejected[[1, 3]], plain.policy_rejected[[1, 3]], rtol=1e-5, atol=0)


def test_sign_steps_on_the_text_of_a_real_network(tiny_pipeline: Path):
    """The first step by a gradient of its own, written out."""
    module = ready(tiny_pipeline, TextAdversary(steps=1, step=0.6, share=1.0, noise=0.0))
    batch = batch_of([0])
    found = module.errors(batch)
    noisy, timesteps, target, conditioning = module.noised(batch)
    text = conditioning[HIDDEN][:1]
    leaf = text.clone().requires_grad_()
    error = prediction_error(module.backbone.predict(noisy[1:], timesteps[1:], {HIDDEN: leaf}), target[1:])
    (slope,) = torch.autograd.grad(error.sum(), leaf)
    moved = {HIDDEN: (text - 0.6 * text.std() * slope.sign()).repeat(2, 1, 1)}
    with torch.no_grad():
        expected = prediction_error(module.backbone.predict(noisy, timesteps, moved), target)
    torch.testing.assert_close(torch.cat([found.policy_chosen, found.policy_rejected]).detach(), expected)


def test_a_batch_is_its_halves(tiny_pipeline: Path):
    parts = everywhere(share=0.7, noise=0.5, clean_share=0.7)
    module = ready(tiny_pipeline, *parts)
    whole = module.errors(batch_of([0, 1, 2, 3, 4, 5, 6, 7]))
    halves = [module.errors(batch_of(rows)) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    for name in ("policy_chosen", "policy_rejected"):
        joined = torch.cat([getattr(half, name) for half in halves])
        torch.testing.assert_close(getattr(whole, name), joined, rtol=1e-4, atol=0)


def test_noise_on_clean_pairs_is_theirs(tiny_pipeline: Path):
    """c + clip(noise x radius x n, radius) x deviation of c, n by the pair's seed; harmful pairs are not attacked."""
    module = ready(tiny_pipeline, TextAdversary(share=0.0, noise=0.5, radius=0.8))
    batch = batch_of([0, 1])
    found = module.errors(batch)
    noisy, timesteps, target, conditioning = module.noised(batch)
    text = conditioning[HIDDEN][:2].clone()
    noise = (normal(batch.seeds[1:], f"adversary-0-noise-{HIDDEN}", text.shape[1:]) * 0.4).clamp(-0.8, 0.8)
    text[1] += noise[0] * text[1].std()
    with torch.no_grad():
        expected = prediction_error(
            module.backbone.predict(noisy, timesteps, {HIDDEN: torch.cat([text, text])}), target
        )
    torch.testing.assert_close(torch.cat([found.policy_chosen, found.policy_rejected]).detach(), expected)


def test_who_is_attacked_follows_from_seeds_and_dropped_prompts_are_not():
    batch = batch_of(list(range(40)))
    seeds = dict(enumerate(batch.seeds))
    part = TextAdversary(share=0.4, clean_share=0.3)
    moved = Moved(part, 1, batch, [row == 4 for row in range(40)], 0, torch.device("cpu"))
    assert moved.attacked == [r for r in range(0, 40, 2) if uniform(seeds[r], "adversary-1") < 0.4 and r != 4]
    assert moved.disturbed == [r for r in range(1, 40, 2) if uniform(seeds[r], "adversary-1") < 0.3]
    assert 0 < len(moved.attacked) < 15


@pytest.mark.parametrize("part", [None, *everywhere(share=0.0, noise=0.0)])
def test_without_an_attack_bits_are_those_of_a_module_without_adversary(tiny_pipeline: Path, part: Any):
    plain = ready(tiny_pipeline).errors(batch_of([0, 1, 2]))
    found = ready(tiny_pipeline, *([] if part is None else [part])).errors(batch_of([0, 1, 2]))
    assert torch.equal(found.policy_rejected, plain.policy_rejected)


def test_validation_is_not_attacked(tiny_pipeline: Path):
    batch = batch_of([0, 2])
    module = ready(tiny_pipeline, *everywhere(share=1.0)).eval()
    assert torch.equal(module.errors(batch).policy_rejected, ready(tiny_pipeline).eval().errors(batch).policy_rejected)


class Reads(TorchDispatchMode):
    """Collects what makes the host wait for a device: numbers that are read, sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            name in str(func)
            for name in ("_local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero")
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_search_reads_nothing_from_the_device(tiny_pipeline: Path):
    batch = batch_of([0, 1, 2, 3])
    plain, parts = ready(tiny_pipeline), everywhere(share=1.0)
    parts[1] = TextAdversary(replay=4, replay_share=1.0, start=0.2, restarts=2, share=1.0)
    module = ready(tiny_pipeline, *parts)
    for one in (plain, module):  # what is loaded when it is first used
        one.errors(batch)
    found = []
    for one in (plain, module):
        with Reads() as reads:
            one.errors(batch)
            for part in [] if one.attack is None else one.attack.parts:
                part.turn(lambda values: values)
        found.append(reads.found)
    assert found[1] == found[0]


# ---- soft tokens


def test_soft_tokens_stand_behind_the_start_and_the_end_token_stays(tiny_pipeline: Path):
    """16 places: start, words, end. The encoder reads start, two vectors, the words; of a prompt that is too long its
    end token is kept."""
    backbone = ready(tiny_pipeline).backbone
    ((_, start, encoder, layer),) = _encoders(backbone)
    read: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, given, found: read.append(found))
    prompts = ["a red cat", "a red cat and a red cat and a red cat and a red cat and a red cat"]
    plain = backbone.encode_text(prompts)
    vectors = torch.arange(2 * 2 * 32.0).view(2, 2, 32)
    with _soft_tokens(encoder, layer, vectors, start):
        soft = backbone.encode_text(prompts)
    handle.remove()
    before, after = read[0], layer(torch.tensor([0, 1]))  # start and end token
    ids = backbone.part("tokenizer")(prompts[0])["input_ids"]
    assert len(read) == 2
    assert not torch.equal(plain[HIDDEN], soft[HIDDEN])
    words = len(ids) - 2
    # The hook of ours ran after the one that reads, so the vectors themselves are seen by their effect alone.
    assert torch.equal(read[1][0, 3 : 3 + words], before[0, 1 : 1 + words])
    assert torch.equal(read[1][0, 0], after[0])
    assert torch.equal(read[1][1, -1], after[1])
    assert torch.equal(backbone.encode_text(prompts)[HIDDEN], plain[HIDDEN])  # and all is as it was


def test_a_soft_token_that_is_a_word_is_that_word(tiny_pipeline: Path):
    """The embedding of `a` in front of `cat` is the prompt `a cat`."""
    backbone = ready(tiny_pipeline).backbone
    ((_, start, encoder, layer),) = _encoders(backbone)
    (word,) = backbone.part("tokenizer")("a")["input_ids"][1:-1]
    vectors = layer.weight[word].expand(2, 1, -1)
    with torch.no_grad(), _soft_tokens(encoder, layer, vectors, start):
        soft = backbone.encode_text(["cat", "a cat"])[HIDDEN]
    with torch.no_grad():
        torch.testing.assert_close(soft, backbone.encode_text(["a cat", "a a cat"])[HIDDEN])


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_flow_families_are_attacked(family: str, tmp_path: Path, request: pytest.FixtureRequest):
    """On what they read and on hidden states; in front of the encoder where that is one of CLIP's or T5."""
    sd3 = family == "sd3"
    pipeline = request.getfixturevalue("tiny_sd3") if sd3 else save_flow(family, tmp_path / family)
    plain = ready(pipeline).errors(batch_of([0, 2]))
    parts: list[Any] = [TextAdversary(share=1.0), HiddenAdversary(["attn"], share=1.0)]
    for part in [*parts, *([] if family == "qwen_image" else [TextAdversary(tokens=2, share=1.0)])]:
        found = ready(pipeline, part).errors(batch_of([0, 2]))
        assert bool((found.policy_rejected != plain.policy_rejected).all())
        assert float((found.policy_rejected - plain.policy_rejected).detach().mean()) < 0


# ---- what is remembered


def remembering(size: int, rows: Sequence[int], values: Sequence[float], memory: Memory | None = None) -> Memory:
    """A memory that kept one number for each of these harmful pairs."""
    memory = memory or Memory(size)
    batch = batch_of(list(rows))
    moved = Moved(TextAdversary(share=1.0, replay=size), 0, batch, [False] * len(rows), 0, torch.device("cpu"))
    moved.found = {"x": torch.tensor(values).unsqueeze(1)}
    moved.shapes = {"x": (1,)}
    memory.keep(moved)
    return memory


def same(values: Tensor) -> Tensor:
    return values


def test_the_newest_are_remembered_in_one_order_whatever_the_batches_and_ranks():
    together = remembering(3, [0, 2], [1.0, 2.0])
    remembering(3, [4, 6], [3.0, 4.0], together)
    ranks = [remembering(3, [6, 0], [4.0, 1.0]), remembering(3, [2, 4], [2.0, 3.0])]
    together.turn(same)
    news = [{name: torch.cat([one[name] for one in rank._new]) for name in rank._new[0]} for rank in ranks]
    joined = {name: torch.cat([new[name] for new in news]) for name in news[0]}
    ranks[0]._new = [joined]
    ranks[0].turn(same)
    assert torch.equal(ranks[0].values["x"], together.values["x"])
    assert len(set(together.values["x"].flatten().tolist())) == 3
    assert together.category.tolist() == [2, 2, 2]  # violence
    held = together.values["x"].flatten().tolist()
    remembering(3, [8], [9.0], together)
    together.turn(same)
    assert together.values["x"].flatten().tolist() == [9.0, *held[:2]]


def test_a_pair_goes_on_from_one_of_its_category():
    memory = Memory(4)
    memory.category = torch.tensor([2, 0, 2, -1])
    memory.values = {"x": torch.tensor([[1.0], [2.0], [3.0], [0.0]])}
    start = torch.full((5, 1), 7.0)
    found = memory.picked("x", start, [2, 2, 0, 5, 2], [True, True, True, True, False], [0.1, 0.6, 0.9, 0.5, 0.1])
    assert found.flatten().tolist() == [1.0, 3.0, 2.0, 7.0, 7.0]
    assert torch.equal(Memory(4).picked("x", start, [2] * 5, [True] * 5, [0.5] * 5), start)


def test_what_was_found_is_where_the_next_search_begins(tiny_pipeline: Path):
    """Steps of almost nothing: what is remembered of pair 0 is what pair 2, of the same category, is disturbed with."""
    part = TextAdversary(replay=1, replay_share=1.0, steps=1, step=1e-9, start=1.0, radius=9.0, share=1.0)
    module = ready(tiny_pipeline, part)
    module.errors(batch_of([0]))
    part.turn(same)
    remembered = part.state_dict()["values"][HIDDEN][0]
    torch.testing.assert_close(remembered, normal([1000], f"adversary-0-start-0-{HIDDEN}", remembered.shape)[0])
    module.errors(batch_of([2]))
    part.turn(same)
    torch.testing.assert_close(part.state_dict()["values"][HIDDEN][0], remembered)


def test_a_checkpoint_holds_what_is_remembered_and_another_setting_is_refused():
    memory = remembering(3, [0, 2], [1.0, 2.0])
    memory.turn(same)
    part, other = TextAdversary(replay=3), TextAdversary(replay=4)
    part.load_state_dict(memory.state_dict())
    assert torch.equal(part.state_dict()["values"]["x"], memory.values["x"])
    for one in (other, TextAdversary(), HiddenAdversary(["attn2"])):
        with pytest.raises(ValueError, match="checkpoint"):
            one.load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="replay"):
        part.load_state_dict({})


# ---- what is refused


def test_what_cannot_be_attacked_is_said(tiny_pipeline: Path, tmp_path: Path):
    backbone = ready(tiny_pipeline).backbone
    with pytest.raises(UserError, match=r"data\.init_args\.train.*use_cache"):
        TextAdversary(tokens=2).check(backbone, ["data.init_args.train"])
    TextAdversary().check(backbone, ["data.init_args.train"])
    with pytest.raises(UserError, match="nosuch"):
        HiddenAdversary(["attn2", "nosuch"]).check(backbone, [])
    with pytest.raises(UserError, match=r"speed\.compile"):
        HiddenAdversary(["attn2"]).check(backbone, [], compiled=True)
    with pytest.raises(ValueError, match=r"speed\.selective"):
        SCDPO(str(tiny_pipeline), adversary=TextAdversary(), speed=Speed(selective=SelectiveBackward()))


def test_strategies_that_spread_weights_are_refused_by_name():
    attack = Attack(TextAdversary())
    for strategy, name in ((ModelParallelStrategy(), "FSDP2"), (DeepSpeedCPU(stage=2), "DeepSpeed ZeRO 1 or 2")):
        module: Any = SimpleNamespace(_trainer=SimpleNamespace(strategy=strategy))
        with pytest.raises(UserError, match=f"{name}.*ddp"):
            attack.check(module)


def test_soft_tokens_of_an_unknown_encoder_are_refused(tmp_path: Path):
    module = ready(save_flow("qwen_image", tmp_path / "qwen"))
    with pytest.raises(UserError, match="tokens"):
        TextAdversary(tokens=1).check(module.backbone, [])


@pytest.mark.parametrize(
    "settings",
    [
        *({"radius": 0.0}, {"step": float("nan")}, {"steps": 0}, {"share": 1.1}, {"noise": -1.0}, {"restarts": 2}),
        *({"tokens": -1}, {"replay": -1}, {"replay_share": 2.0}, {"grow": -1}, {"start": -0.1}, {"clean_share": -0.1}),
    ],
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TextAdversary(**settings)


def test_a_batch_without_categories_is_remembered_by_itself():
    batch = replace(batch_of([0]), categories=[()])
    moved = Moved(TextAdversary(share=1.0), 0, batch, [False], 0, torch.device("cpu"))
    assert moved.categories() == [8]
