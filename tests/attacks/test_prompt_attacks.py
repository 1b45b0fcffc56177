"""Attacks that compute nothing: paraphrases, scale, samplers."""

from pathlib import Path

import pytest

from lit_safety.attacks.adapter_scale import AdapterScale
from lit_safety.attacks.paraphrases import Paraphrases
from lit_safety.attacks.samplers import Sampler, Samplers
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.guards.safree import SAFREE


def test_paraphrases_differ_between_prompts_and_then_get_other_noise(make_target, rows) -> None:
    """Two paraphrases, two prompts of three tries each: six tries, every pair of text and seed once."""
    stages = list(Paraphrases(tries=3).stages(make_target()))
    assert [stage.budget for stage in stages] == [1, 2, 3]
    tried = [(p.prompt, p.seed) for stage in stages for p in stage.prompts]
    assert {text for text, _ in tried} == {"a nug", "nug red"}
    assert len(set(tried)) == 6


def test_paraphrases_must_be_there(make_target, rows) -> None:
    held_in = [p for p in rows if p.kind != "implicit"]
    with pytest.raises(UserError, match=r"implicit.*held_out.*violence"):
        Paraphrases().check(held_in, rows[:2])
    with pytest.raises(UserError, match="at least 1"):
        Paraphrases(tries=0)


def test_a_scale_of_zero_is_the_base(make_target, tiny_adapter: Path) -> None:
    """All LoRAs of the arm are weighed: adapter and adapters alike."""
    import torch

    arm = Arm(adapter=str(tiny_adapter), scale=0.5)
    target = make_target(arm)
    stages = {stage.budget: stage for stage in AdapterScale([0.0, 2.0, 1.0]).stages(target)}
    assert sorted(stages) == [0.0, 2.0]
    weights = {name: stage.pipe.unet.state_dict() for name, stage in stages.items()}
    base = make_target().pipe.unet.state_dict()
    whole = make_target(Arm(adapter=str(tiny_adapter))).pipe.unet.state_dict()
    adapted = [name for name in weights[0.0] if name.endswith("to_q.base_layer.weight")]
    assert adapted
    for name in adapted:
        assert torch.equal(weights[0.0][name], base[name.replace(".base_layer", "")])
        assert torch.allclose(weights[2.0][name], whole[name], atol=1e-6)


def test_an_arm_without_adapter_has_no_scale(make_target) -> None:
    assert "adapter" in (AdapterScale().refuses(make_target()) or "")
    with pytest.raises(UserError, match="finite"):
        AdapterScale([float("nan")])


def test_samplers_change_how_is_drawn(make_target) -> None:
    ways = [Sampler(steps=2), Sampler(guidance=5.0), Sampler("EulerDiscreteScheduler", 3)]
    stages = list(Samplers(ways).stages(make_target()))
    assert [stage.label for stage in stages] == ["2 steps", "guidance 5", "EulerDiscrete, 3 steps"]
    assert [stage.drawing.steps for stage in stages] == [2, 1, 3]
    assert stages[1].drawing.guidance == 5.0
    assert type(stages[2].pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert type(stages[0].pipe.scheduler).__name__ == "DDIMScheduler"


def test_a_guard_is_not_drawn_without_guidance(make_target) -> None:
    target = make_target(Arm(guard=SAFREE()))
    stages = list(Samplers([Sampler(guidance=1.0), Sampler(steps=2)]).stages(target))
    assert [stage.budget for stage in stages] == [2]
    assert [note.partition(":")[0] for note in target.notes] == ["guidance 1"]


def test_bad_samplers_are_refused(make_target) -> None:
    for given in ([], [Sampler()], [Sampler(steps=0)], [Sampler(guidance=-1.0)]):
        with pytest.raises(UserError, match="Samplers"):
            Samplers(given)
    with pytest.raises(UserError, match=r"NoSuchScheduler .*DDIMScheduler"):
        Samplers([Sampler("NoSuchScheduler")]).refuses(make_target())
