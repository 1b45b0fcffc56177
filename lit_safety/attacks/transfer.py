"""Transfer: the result of an attack on one arm is tried on the other arms, which the attack did not use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lit_safety.attacks.network import Network
from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.drawing.prompts import Prompt


class Transfer(Attack):
    """Runs another attack against one arm, and draws its result with every other arm, with the same prompts and seeds.

    If an arm resists an attack against itself but not the result found on another arm, it has not become safe: only its
    gradients have become useless (gradient masking).

    Args:
        attack: the attack, by class_path and init_args; it must find prompts, words, noise or images, not weights.
        source: the arm that it attacks.
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
            return "it is the attacked arm itself; the attack's own curve shows its result"
        if self.attack.changes_denoiser:
            return f"{type(self.attack).__name__} finds weights, which cannot be used with another arm"
        if (reason := target.closed()) is not None:
            return reason
        source = self._source(target)
        if (reason := self.attack.refuses(source)) is not None:
            return f"the attack does not apply to {self.source}: {reason}"
        ours, theirs = _kind(target), _kind(source)
        return None if ours == theirs else f"it draws with a {ours}, but {self.source} with a {theirs}"

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
        """The arm that the attack is run against, as a target."""
        assert target.other is not None, "a target of a run knows the other arms"
        return replace(target.other(self.source), notes=[], tell=lambda text: target.tell(f"on {self.source}: {text}"))


def _kind(target: Target) -> str:
    from lit_safety.backbones.pipeline_index import pipeline_class_name

    return pipeline_class_name(str(target.folder))
