"""Where the names of version 0.1 are now, for the one-line error about an old name."""

from __future__ import annotations

from lit_safety.core.errors import UserError

#: A file of version 0.1 -> where the public names that it held are now; OLD=NEW where the class was renamed.
HOMES = {
    "adapters.psa_pipeline": "adapters.load_psa adapters.unload_psa",
    "attacks.attack": "attacks.Attack attacks.Stage",
    "attacks.concept_direction": "attacks.ConceptDirection",
    "attacks.prediction_match": "attacks.PredictionMatch",
    "callbacks.export_cost_model": "callbacks.ExportCostModel",
    "callbacks.export_user_adapter": "callbacks.ExportUserAdapter",
    "callbacks.stop_on_signal": "callbacks.StopOnSignal",
    "cost_model.objective": "cost_model.CostLoss cost_model.InfoNCECostLoss cost_model.PairwiseCostLoss",
    "cost_model.scorer": "cost_model.CostScorer",
    "cost_model.tower": "cost_model.ClipTower",
    "data.batch": "data.PairBatch",
    "data.categories": "core.CATEGORIES core.canonical_category",
    "data.chance": "core.normal core.uniform",
    "data.generate.scorers": "generation.ClipScorer generation.Scorer",
    "data.sample": "data.PairMetadata",
    "data.writer": "data.ShardWriter",
    "errors": "core.UserError",
    "evaluation.clip": "judges.Clip",
    "evaluation.clip_judge": "ZeroShotClipJudge=judges.ZeroShotClip",
    "evaluation.cost_judge": "judges.CostJudge",
    "evaluation.judges": "judges.Judge judges.JudgeError judges.ToyWorldJudge judges.Verdict judges.load_judge",
    "evaluation.nudenet_judge": "NudeNetJudge=judges.NudeNet",
    "evaluation.preference": "judges.AestheticScore judges.ClipPreference judges.ImageRewardScore",
    "evaluation.q16_judge": "Q16Judge=judges.Q16",
    "evaluation.safe_latent_diffusion": "guards.SafeLatentDiffusion",
    "evaluation.safree": "guards.SAFREE",
    "evaluation.union_judge": "UnionJudge=judges.Union",
    "evaluation.user_vlm": "evaluation.UserVLM",
    "evaluation.vlm_judge": "VLMJudge=judges.VLM",
    "modules.selective": "modules.SelectiveBackward",
    "objectives.diffusion_dpo": "objectives.DiffusionDPO objectives.dpo_loss",
    "objectives.hinge": "objectives.Hinge objectives.hinge_loss",
    "objectives.ipo": "objectives.IPO objectives.ipo_loss",
    "objectives.pair": "objectives.PairErrors objectives.PairLabels objectives.delta objectives.margin "
    "objectives.prediction_error objectives.residual_overlap",
    "objectives.regularizers": "objectives.anchor_loss objectives.sft_loss",
    # Names that a package exported and no longer exports.
    "data": "core.CATEGORIES core.canonical_category",
}
PACKAGE = "lit_safety"


class MovedError(UserError, ImportError):
    """A name of version 0.1: the message says where it is now."""


def new_names(module: str) -> dict[str, str]:
    """The public names that a file of version 0.1 held -> their paths now, from `lit_safety` on."""
    found = {}
    for one in HOMES.get(module, "").split():
        old, _, new = one.rpartition("=")
        found[old or new.rpartition(".")[2]] = f"{PACKAGE}.{new}"
    return found


def explain(path: str) -> str | None:
    """One line about a path below `lit_safety` that does not exist.

    Args:
        path: of a file, or of a class or function in one, such as `lit_safety.evaluation.safree.SAFREE`.

    Returns:
        Where it is now. None: such a class never existed, and Python's own message is better.
    """
    inner = path.removeprefix(f"{PACKAGE}.")
    module, _, name = inner.rpartition(".")
    if (now := new_names(module).get(name)) is not None:
        return f"{path} is {now} since version 0.2"
    if inner in HOMES:
        return f"{path} is not a file since version 0.2: {_listed(new_names(inner))}"
    if name[:1].isupper() and module not in HOMES:
        return None
    return (
        f"there is no {path}: since version 0.2 public names are a package and a name, such as "
        f"{PACKAGE}.judges.NudeNet, and files have moved; the reference in docs/ lists the names"
    )


def _listed(names: dict[str, str]) -> str:
    return ", ".join(f"{old} is {new}" for old, new in names.items())
