from collections.abc import Callable
from itertools import permutations
from typing import get_args

import pytest
import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.merging.experts import Expert
from lit_safety.merging.merge_experts import Merged, merge_experts, merge_looked, report
from lit_safety.merging.methods import Activity, owners
from lit_safety.merging.options import Method, Recipe
from lit_safety.merging.regmean import Grams

METHODS = get_args(Method)
EXACT = ("mean", "sum", "comerge")


def activity_of(experts: list[Expert], prompts: int = 9) -> dict[str, Activity]:
    """Random inputs through the experts, in the order of their names."""
    experts = sorted(experts, key=lambda expert: expert.name)
    found = {}
    for number, layer in enumerate(sorted({name for expert in experts for name in expert.layers})):
        known = [expert.layers.get(layer) for expert in experts]
        out, inputs = next(part for part in known if part is not None).shape
        x = torch.randn(prompts, inputs, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        outputs = [x.new_zeros(prompts, out) if part is None else (x @ part.delta().T).abs() for part in known]
        found[layer] = Activity.empty(len(experts), out, inputs)
        found[layer].add(torch.stack(outputs), x.abs())
    return found


def merged(experts: list[Expert], method: str, **settings) -> Merged:
    recipe = Recipe(method=method, **settings)
    if recipe.clean_inputs:
        return merge_looked(experts, [recipe], [grams_of(experts)])[0]
    return merge_experts(experts, recipe, activity_of(experts))


def grams_of(experts: list[Expert], clean: int = 20) -> dict[str, Grams]:
    """Of random inputs, those of an expert by its name; of ``clean`` different ones where what must stay is."""
    found = {}
    for number, layer in enumerate(sorted({name for expert in experts for name in expert.layers})):
        inputs = next(expert.layers[layer] for expert in experts if layer in expert.layers).shape[1]

        def gram(seed: int, tokens: int, size: int = inputs) -> torch.Tensor:
            x = torch.randn(size, tokens, generator=torch.Generator().manual_seed(seed))
            return x @ x.T / tokens

        own = [gram(100 * number + ord(expert.name), 20) for expert in sorted(experts, key=lambda one: one.name)]
        found[layer] = Grams(tuple(own), gram(number, clean))
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rank", "dtype"), [(2, torch.float32), (2, torch.float16), (9, torch.float16)])
def test_one_expert_returns_itself_to_the_bit(
    make_expert: Callable[..., Expert], method: str, rank: int, dtype: torch.dtype
):
    """Also where its rank is above the layers' sides, 4 to 7, and could be reduced."""
    expert = make_expert("a", 0, rank=rank, dtype=dtype)
    found = merge_experts([expert], Recipe(method=method))
    for name, layer in expert.layers.items():
        assert torch.equal(found.layers[name].a, layer.a)
        assert torch.equal(found.layers[name].b, layer.b)
        assert found.layers[name].a.dtype == dtype
        assert found.layers[name].scale == layer.scale
    assert found.residual == 0.0


def test_a_mean_of_one_is_that_one_whatever_it_weighs(make_expert: Callable[..., Expert]):
    """.5 delta / 0.5, and no other for svd, which is the mean cut."""
    expert = make_expert("a", 0)
    for method in ("mean", "svd"):
        found = merge_experts([expert], Recipe(method=method, weights={"a": 0.5}))
        assert all(torch.equal(found.layers[name].delta(), layer.delta()) for name, layer in expert.layers.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_experts_does_not_matter(make_expert: Callable[..., Expert], method: str):
    experts = [make_expert("a", 0), make_expert("b", 1, rank=1, scale=2.0), make_expert("c", 2, rank=3)]
    weights = {} if method == "comerge" else {"a": 1.0, "b": 0.5, "c": 2.0}
    first = merged(experts, method, weights=weights)
    for order in permutations(experts):
        found = merged(list(order), method, weights=weights)
        for name in first.layers:
            assert torch.equal(found.layers[name].delta(), first.layers[name].delta())


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_multiplies_the_merged_update(make_expert: Callable[..., Expert], method: str):
    experts = [make_expert("a", 0), make_expert("b", 1, rank=1, scale=2.0)]
    plain, larger = merged(experts, method, scale=1.0), merged(experts, method, scale=1.5)
    for name in plain.layers:
        expected = 1.5 * plain.layers[name].delta()
        torch.testing.assert_close(larger.layers[name].delta(), expected, rtol=1e-4, atol=1e-5)
    alone = merge_experts(experts[:1], Recipe(method=method, scale=0.5)).layers
    for name, layer in experts[0].layers.items():
        torch.testing.assert_close(alone[name].delta(), 0.5 * layer.delta(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_scale(make_expert: Callable[..., Expert], method: str):
    """comerge of four: 1.06 sqrt(4) = 2.12; of one, and every other method: 1."""
    experts = [make_expert(name, seed) for seed, name in enumerate("abcd")]
    found, plain = merged(experts, method), merged(experts, method, scale=1.0)
    scale = 2.12 if method == "comerge" else 1.0
    for name, layer in plain.layers.items():
        torch.testing.assert_close(found.layers[name].delta(), scale * layer.delta(), rtol=1e-4, atol=1e-5)
    recipe = Recipe(method=method)
    assert report(found, experts, recipe, None, {})["recipe"]["scale"] == pytest.approx(scale)
    assert recipe.scale_of(1) == 1.0
    assert Recipe(method=method, scale=3.0).scale_of(4) == 3.0


@pytest.mark.parametrize("method", EXACT)
def test_the_block_form_is_the_merge_of_the_whole_updates(make_expert: Callable[..., Expert], method: str):
    """Ranks 2 + 1 + 2 on sides of 4 to 7, so that some layers need the exact reduction."""
    experts = [make_expert("a", 0), make_expert("b", 1, rank=1), make_expert("c", 2, scale=-1.5)]
    activity = activity_of(experts)
    found = merged(experts, method, scale=1.0)
    for name, layer in found.layers.items():
        deltas = torch.stack([expert.layers[name].delta() for expert in experts])
        expected = deltas.sum(0) if method == "sum" else deltas.mean(0)
        if method == "comerge":
            expected = torch.stack([deltas[k, j] for j, k in enumerate(owners(activity[name], "vote", True).tolist())])
            assert sum(found.fits[name].rows.values()) == layer.shape[0]
        torch.testing.assert_close(layer.delta(), expected, rtol=1e-5, atol=1e-6)
        assert layer.rank <= min(5, *layer.shape)
    assert found.residual < 1e-6  # rounding to fp32 only


def test_the_residual_is_exactly_zero_where_nothing_is_rounded():
    def expert(name: str, seed: int) -> Expert:
        draw = torch.Generator().manual_seed(seed)
        whole = torch.randint(-4, 5, (2, 8), generator=draw).float(), torch.randint(-4, 5, (8, 2), generator=draw)
        return Expert(name, {"unet.x": LowRank(whole[0], whole[1].float(), 0.5)})

    assert merged([expert("a", 0), expert("b", 1)], "sum").residual == 0.0


def test_truncation_reports_what_is_lost(make_expert: Callable[..., Expert]):
    """The residual is the norm of the singular values that were left out over the norm of all, layer by layer."""
    experts = [make_expert("a", 0), make_expert("b", 1)]
    full, cut = merged(experts, "mean"), merged(experts, "mean", rank=1)
    lost = norm = 0.0
    for name, layer in full.layers.items():
        values = torch.linalg.svdvals(layer.delta())
        assert cut.layers[name].rank == 1
        assert cut.fits[name].residual == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-5)
        lost, norm = lost + float(values[1:].norm()) ** 2, norm + float(values.norm()) ** 2
    assert cut.residual == pytest.approx((lost / norm) ** 0.5, rel=1e-5)
    svd = merged(experts, "svd")
    assert {layer.rank for layer in svd.layers.values()} == {2}


@pytest.mark.parametrize("method", METHODS)
def test_different_layers_are_united(make_expert: Callable[..., Expert], method: str):
    """A layer that an expert does not adapt counts as a zero update."""
    one = make_expert("a", 0, sizes={"unet.x": (4, 4), "unet.y": (4, 4)})
    two = make_expert("b", 1, sizes={"unet.x": (4, 4)})
    found = merged([one, two], method, density=1.0, drop=0.0, scale=1.0)
    assert set(found.layers) == {"unet.x", "unet.y"}
    share = 0.5 if method in ("mean", "svd") else 1.0
    if method == "regmean":  # which what must stay takes a part of
        return
    torch.testing.assert_close(
        found.layers["unet.y"].delta(), share * one.layers["unet.y"].delta(), rtol=1e-5, atol=1e-6
    )


def test_comerge_scales_a_layer_by_the_experts_that_adapt_it(make_expert: Callable[..., Expert]):
    """x is of both: 1.06 sqrt(2). y is of the first alone, which owns all of it: as it is, as if merged alone."""
    one = make_expert("a", 0, sizes={"unet.x": (4, 4), "unet.y": (4, 4)})
    two = make_expert("b", 1, sizes={"unet.x": (4, 4)})
    found, plain = merged([one, two], "comerge"), merged([one, two], "comerge", scale=1.0)
    for name, scale in (("unet.x", 1.06 * 2**0.5), ("unet.y", 1.0)):
        torch.testing.assert_close(found.layers[name].delta(), scale * plain.layers[name].delta(), rtol=1e-5, atol=1e-6)
        assert report(found, [one, two], Recipe(), None, {})["layers"][name]["scale"] == pytest.approx(scale)
    torch.testing.assert_close(found.layers["unet.y"].delta(), one.layers["unet.y"].delta(), rtol=1e-6, atol=1e-7)


def test_different_backbones_are_refused(make_expert: Callable[..., Expert]):
    one = make_expert("a", 0, sizes={"unet.x": (4, 4)})
    with pytest.raises(UserError, match=r"a and b .*different backbones: unet\.x is 4 -> 4 in one and 8 -> 4"):
        merge_experts([one, make_expert("b", 1, sizes={"unet.x": (4, 8)})], Recipe(method="sum"))
    with pytest.raises(UserError, match="denoisers are called a: unet; b: transformer"):
        merge_experts([one, make_expert("b", 1, sizes={"transformer.x": (4, 4)})], Recipe(method="sum"))
    with pytest.raises(UserError, match="share a name"):
        merge_experts([one, one], Recipe(method="sum"))


def test_numbers_out_of_half_precisions_range_are_refused(make_expert: Callable[..., Expert]):
    experts = [make_expert("a", 0), make_expert("b", 1, scale=1e6)]
    with pytest.raises(UserError, match=r"unet\.mid\.to_k: .*--dtype float32"):
        merged(experts, "sum", dtype="float16")
    with pytest.raises(UserError, match=r"float32.*--weights"):
        merged(experts, "sum", weights={"b": 1e38})


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"rank": 0}, "--rank"), ({"density": 0.0}, "--density"), ({"drop": 1.0}, "--drop"),
     ({"method": "comerge", "weights": {"a": 2.0}}, "--weights"), ({"scale": 0.0}, "--scale"),
     ({"scale": float("nan")}, "--scale"), ({"mu": -1.0}, "--mu"), ({"epsilon": 0.0}, "--epsilon"),
     ({"method": "sum", "null_space": 1.0}, "--null_space"), ({"null_space": 0.1}, "--null_space"),
     ({"method": "sum", "weights": {"a": float("inf")}}, "--weights: that of a is inf")],
)  # fmt: skip
def test_impossible_settings_are_named(settings: dict, named: str):
    with pytest.raises(UserError, match=named):
        Recipe(**settings)


@pytest.mark.parametrize("normalise", [False, True])
def test_single_weights_are_cut_to_the_summed_rank(make_expert: Callable[..., Expert], normalise: bool):
    """Every entry is one expert's before the cut, and the report counts them and says what the cut loses."""
    experts = [make_expert("a", 0), make_expert("b", 1, scale=5.0)]
    found = merged(experts, "comerge", unit="weight", normalise=normalise)
    for name, layer in found.layers.items():
        deltas = torch.stack([expert.layers[name].delta() for expert in experts])
        score = deltas.abs()
        if normalise:
            score = score * activity_of(experts)[name].inputs
            score = score / score.mean(dim=(1, 2), keepdim=True)
        whole = torch.where(score[0] >= score[1], deltas[0], deltas[1])
        values = torch.linalg.svdvals(whole)
        assert layer.rank == min(4, *layer.shape)
        assert found.fits[name].residual == pytest.approx(float(values[4:].norm() / values.norm()), abs=1e-5)
        taken = found.fits[name].rows
        assert sum(taken.values()) == whole.numel()
        assert (taken["a"] < 0.3 * whole.numel()) != normalise
    if not normalise:  # magnitudes alone: no prompts are needed
        recipe = Recipe(method="comerge", unit="weight", normalise=False)
        assert merge_experts(experts, recipe).layers.keys() == found.layers.keys()


def test_a_new_expert_is_added_without_touching_the_others(make_expert: Callable[..., Expert]):
    """The sum of three is the sum of two and the third; comerge gives the new one rows and leaves the others."""
    experts = [make_expert("a", 0), make_expert("b", 1), make_expert("c", 2)]
    two, three = merged(experts[:2], "sum"), merged(experts, "sum")
    owned = [merged(some, "comerge", statistic="magnitude", scale=1.0) for some in (experts[:2], experts)]
    for name, third in experts[2].layers.items():
        torch.testing.assert_close(
            three.layers[name].delta() - two.layers[name].delta(), third.delta(), atol=1e-5, rtol=0
        )
        before, after = (one.layers[name].delta() for one in owned)
        kept = (before - after).abs().amax(dim=1) < 1e-5
        new = (after - third.delta()).abs().amax(dim=1) < 1e-5
        assert (kept | new).all()
        assert int(new.sum()) == owned[1].fits[name].rows["c"]
    with pytest.raises(ValueError, match="calibrate first"):
        merge_experts(experts, Recipe(method="comerge"))
    with pytest.raises(ValueError, match="measure them first"):
        merge_experts(experts, Recipe())


@pytest.mark.parametrize("method", ["sum", "mean", "svd", "ties", "dare", "tsv_m", "iso_c"])
def test_without_what_acts_on_clean_inputs_a_merge_leaves_them_alone(make_expert: Callable[..., Expert], method: str):
    """Clean inputs of 3 directions out of 5 and 7: factors are exact there; TIES and DARE mix entries, and are not."""
    experts = [make_expert("a", 0), make_expert("b", 1, rank=1)]
    grams = grams_of(experts, clean=3)
    recipes = [Recipe(method=method, null_space=1e-4), Recipe(method=method, null_space=1e-4, svc=True)]
    for found in merge_looked(experts, recipes, [grams]):
        for name, layer in found.layers.items():
            assert float(layer.delta().norm()) > 0
            on_clean = float((layer.delta() @ grams[name].anchor.double() @ layer.delta().T).trace())
            if method not in ("ties", "dare"):
                assert on_clean < 1e-6 * float(layer.delta().norm()) ** 2


def test_clean_inputs_that_use_all_directions_are_reported(make_expert: Callable[..., Expert]):
    """The merge would only be the base."""
    experts = [make_expert("a", 0), make_expert("b", 1)]
    with pytest.raises(UserError, match=r"--null_space 1e-09: .* nothing of the experts is left"):
        merge_looked(experts, [Recipe(method="sum", null_space=1e-9)], [grams_of(experts)])


def test_a_single_expert_is_taken_out_of_clean_inputs_where_that_is_asked_for(make_expert: Callable[..., Expert]):
    expert = make_expert("a", 0)
    grams = grams_of([expert], clean=3)
    (found,) = merge_looked([expert], [Recipe(method="sum", null_space=1e-4)], [grams])
    for name, layer in found.layers.items():
        assert layer.a.dtype == torch.float32
        assert float((layer.delta() @ grams[name].anchor.double() @ layer.delta().T).trace()) < 1e-6


def test_what_experts_share_is_counted_once_after_svc(make_expert: Callable[..., Expert]):
    """Three times the same expert: their sum is three times one, and calibrated it is one."""
    one = make_expert("a", 0)
    experts = [one, Expert("b", one.layers), Expert("c", one.layers)]
    for name, layer in merged(experts, "sum", svc=True).layers.items():
        torch.testing.assert_close(layer.delta(), one.layers[name].delta(), rtol=1e-4, atol=1e-5)
    for name, layer in merged(experts, "mean", svc=True).layers.items():
        torch.testing.assert_close(layer.delta(), one.layers[name].delta(), rtol=1e-4, atol=1e-5)
