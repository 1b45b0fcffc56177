import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_safety.adapters import LoRA
from lit_safety.adapters.expert_bank import ExpertBank
from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError

NAMES = ["x.lora_A.policy.weight", "x.lora_B.policy.weight"]


def bank_of(*experts: str, seed: int = 0, rank: int = 2) -> ExpertBank:
    parameters = {NAMES[0]: nn.Parameter(torch.ones(rank, 5)), NAMES[1]: nn.Parameter(torch.ones(3, rank))}
    return ExpertBank(experts, parameters, LoRA(rank=rank), seed)


def adam(bank: ExpertBank) -> torch.optim.AdamW:
    return torch.optim.AdamW(bank.parameters.values(), lr=0.1)


def step(bank: ExpertBank, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()
    optimizer.zero_grad()


def test_turns_are_as_if_each_expert_had_been_trained_alone():
    """Three steps of a and two of b in turns, against a alone and b alone: AdamW's moments and counts included."""
    bank = bank_of("a", "b")
    optimizer = adam(bank)
    for name, seed in (("a", 1), ("b", 11), ("a", 2), ("a", 3), ("b", 12)):
        bank.activate(name, optimizer)
        step(bank, optimizer, seed)
    for name, seeds in (("a", (1, 2, 3)), ("b", (11, 12))):
        alone = bank_of(name)
        single = adam(alone)
        for seed in seeds:
            step(alone, single, seed)
        with bank.shown(name):
            for parameter, expected in zip(bank.parameters.values(), alone.parameters.values(), strict=True):
                assert torch.equal(parameter, expected)


def test_a_fresh_expert_is_the_identity_and_depends_on_its_name_and_the_seed_only():
    bank = bank_of("a", "b")
    first = bank.read()
    assert first[NAMES[1]].count_nonzero() == 0
    assert first[NAMES[0]].count_nonzero() == 10
    with bank.shown("b"):
        second = bank.read()
    assert not torch.equal(first[NAMES[0]], second[NAMES[0]])
    assert torch.equal(
        bank_of("c", "b", "a").lora.draw({}, 0) == {} and bank_of("b").read()[NAMES[0]], second[NAMES[0]]
    )
    assert not torch.equal(bank_of("b", seed=1).read()[NAMES[0]], second[NAMES[0]])


def test_fresh_weights_are_spread_as_peft_spreads_them(tiny_pipeline: Path):
    """gaussian: N(0, 1/r); kaiming: uniform of variance 1 / (3 in)."""
    for init, spread in (("gaussian", 1 / 8), ("kaiming", (1 / (3 * 400)) ** 0.5)):
        drawn = LoRA(rank=8, init=init).draw({"lora_A.policy.weight": (8, 400)}, 0)["lora_A.policy.weight"]
        assert float(drawn.std()) == pytest.approx(spread, rel=0.05)
    for init in ("gaussian", "kaiming"):
        denoiser = load_backbone(str(tiny_pipeline)).denoiser
        parameters = LoRA(rank=8, init=init).attach(denoiser, "policy")
        spreads = [LoRA(rank=8, init=init).draw({"lora_A.x": p.shape}, 0)["lora_A.x"].std() / p.detach().std()
                   for p in parameters if p.count_nonzero()]  # fmt: skip
        assert float(torch.stack(spreads).mean()) == pytest.approx(1, rel=0.1)


def test_what_is_shown_goes_away_again():
    bank = bank_of("a", "b")
    optimizer = adam(bank)
    step(bank, optimizer, 1)
    before = bank.read()
    with bank.shown("b"):
        assert bank.parameters[NAMES[1]].count_nonzero() == 0
    assert bank.active == "a"
    assert all(torch.equal(value, before[name]) for name, value in bank.read().items())
    assert len(optimizer.state) == 2


def test_a_checkpoint_brings_back_what_rests():
    bank = bank_of("a", "b")
    optimizer = adam(bank)
    step(bank, optimizer, 1)
    bank.activate("b", optimizer)
    step(bank, optimizer, 2)
    state, slot, inside = copy.deepcopy((bank.state_dict(), bank.read(), optimizer.state_dict()))

    other = bank_of("a", "b", seed=7)
    resumed = adam(other)
    other.load_state_dict(state)
    with torch.no_grad():
        for name, parameter in other.parameters.items():
            parameter.copy_(slot[name])
    resumed.load_state_dict(inside)
    for one, its in ((bank, optimizer), (other, resumed)):
        one.activate("a", its)
        step(one, its, 3)
        one.activate("b", its)
        step(one, its, 4)
    for name in ("a", "b"):
        with bank.shown(name), other.shown(name):
            assert all(torch.equal(value, other.read()[key]) for key, value in bank.read().items())


def test_checkpoints_of_other_experts_are_refused():
    state = bank_of("a", "b").state_dict()
    with pytest.raises(UserError, match=r"holds the experts a, b.* a, c"):
        bank_of("a", "c").load_state_dict(state)
    bank = bank_of("a", "b")
    bank.activate("b")
    with pytest.raises(UserError, match="expert a has another rank"):
        bank_of("a", "b", rank=3).load_state_dict(bank.state_dict())
