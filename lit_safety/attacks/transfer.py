"""Transfer: what an attack found on one arm is tried on the others, which the attack never saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lit_safety.attacks.network import Network
from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.drawing.prompts import Prompt


class Transfer(Attack):
    """Another attack, done against one arm and drawn by every other arm, with the same prompts and seeds.

    An arm that holds against an attack made for it, and gives way to what was found on another arm, has not become
    safe: its gradients have become useless (gradient masking).

    Args:
        attack: what is done, by class_path and init_args; one that finds prompts, words, noise or images, not weights.
        source: the arm that it is done against.
    """

    def __init__(self, attack: Attack, source: str) -> None:
        self.attack, self.source = attack, source
        self.sources = (source,)
        self.budget = attack.budget  # type: ignore[misc]  # those of the attack, not of this class
        self.cumulative = attack.cumulative  # type: ignore[misc]
        self.origin = attack.origin  # type: ignore[misc]
        self.knows = f"found on {source}, nothing computed on the attacked arm; {attack.knows}"
        self.settings: dict[str, Any] = {"source": source, "attack": self._inner()}

    def _inner(self) -> dict[str, Any]:
        kind = type(self.attack)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **self.attack.settings}

    def take_shards(self, shards: str) -> None:
        self.attack.take_shards(shards)
        self.settings["attack"] = self._inner()

    @property
    def points(self) -> int:
        return self.attack.points

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.attack.check(prompts, attacked)
        self.settings["attack"] = self._inner()

    def refuses(self, target: Target) -> str | None:
        if target.name == self.source:
            return "the attack was done against it: the attack itself says how it fares"
        if self.attack.changes_denoiser:
            return f"{type(self.attack).__name__} finds weights, which belong to the arm they were found on"
        if (reason := target.closed()) is not None:
            return reason
        source = self._source(target)
        if (reason := self.attack.refuses(source)) is not None:
            return f"the attack does not apply to {self.source}: {reason}"
        ours, theirs = _kind(target), _kind(source)
        return None if ours == theirs else f"it draws with a {ours} and {self.source} with a {theirs}"

    def stages(self, target: Target) -> Iterator[Stage]:
        source = self._source(target)
        network: Network | None = None
        for stage in self.attack.stages(source):
            identity = {**stage.identity, "transferred": True}
            if stage.apply is None:
                yield replace(stage, pipe=target.pipe, identity=identity)
                continue
            network = network or target.network()
            yield replace(stage, pipe=stage.apply(network), identity=identity)
        target.notes += source.notes
        source.release()

    def _source(self, target: Target) -> Target:
        """The arm that the attack is done against, as an attack's own target."""
        assert target.other is not None, "a target of a run knows the other arms"
        return replace(target.other(self.source), notes=[], tell=lambda text: target.tell(f"on {self.source}: {text}"))


def _kind(target: Target) -> str:
    from lit_safety.backbones.pipeline_index import pipeline_class_name

    return pipeline_class_name(str(target.folder))
