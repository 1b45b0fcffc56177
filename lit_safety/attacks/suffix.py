"""Suffix search: a few words behind the prompt, chosen so that the model takes it for what alignment took away.

What is searched for is text, so guards and negative prompts meet it as they meet any prompt. They are not in the
search: the arm's text encoder (and denoiser, where the goal needs it) is searched without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_safety.attacks.attack import Attack, Stage, increasing
from lit_safety.attacks.network import Network, compute_threads
from lit_safety.attacks.search import Best, greedy_search, random_search
from lit_safety.attacks.similarity import Likeness, Similarity
from lit_safety.attacks.target import Target
from lit_safety.attacks.words import Words, shorten_to_fit, suffix_starts, usable_words
from lit_safety.data.chance import generator
from lit_safety.errors import UserError
from lit_safety.evaluation.fingerprint import digest
from lit_safety.evaluation.parallel import threads

if TYPE_CHECKING:
    from lit_safety.evaluation.prompts import Prompt

CHUNK = 64
"""Suffixed prompts encoded at once, where no denoiser sees them."""


class SuffixSearch(Attack):
    """Search for a suffix of each prompt; at each point of the curve the best one so far is drawn.

    Args:
        goal: what is maximised: ConceptDirection or PredictionMatch, by class_path and init_args.
        method: random needs scores alone, greedy also gradients with respect to the tokens.
        length: words of the suffix.
        budgets: candidates tried for each prompt, at each point of the curve.
        batch: candidates scored at once; of the greedy search, after each gradient.
        shortlist: words of the highest derivative at each place that the greedy search draws from.
    """

    budget: ClassVar[str] = "candidates tried"
    cumulative: ClassVar[bool] = True

    def __init__(
        self,
        goal: Similarity,
        method: Literal["random", "greedy"] = "greedy",
        length: int = 4,
        budgets: Sequence[int] = (16, 64, 256),
        batch: int = 16,
        shortlist: int = 16,
    ) -> None:
        if min(length, batch, shortlist) < 1:
            raise UserError("SuffixSearch: length, batch and shortlist must be at least 1")
        self.goal, self.method, self.length = goal, method, length
        self.budgets = increasing(budgets, "SuffixSearch: budgets")
        self.batch, self.shortlist = batch, shortlist
        self.settings: dict[str, Any] = {
            "method": method, "length": length, "budgets": self.budgets, "batch": batch,
            **({"shortlist": shortlist} if method == "greedy" else {}), "goal": goal.settings,
        }  # fmt: skip
        access = "gradients of" if method == "greedy" else "outputs of"
        colour = "black box as to the denoiser" if goal.text_only else "white box"
        self.knows = f"{colour}: {access} {goal.knows}"
        self._found: dict[str, tuple[list[tuple[int, list[str]]], list[str]]] = {}

    @property
    def points(self) -> int:
        return len(self.budgets)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.goal.check(attacked)

    def refuses(self, target: Target) -> str | None:
        tokenizers = [p for n, p in target.pipe.components.items() if n.startswith("tokenizer") and p is not None]
        if any(one.get_vocab() != tokenizers[0].get_vocab() for one in tokenizers):
            return "its text encoders do not share one vocabulary"
        return target.unknown() if self.goal.text_only else target.closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        if not self.goal.text_only:
            for tried, texts in self._search(target):
                yield self._stage(target, tried, texts)
            return
        # Arms of one pipeline have the same text encoder: the same texts would be found again.
        key = digest([str(target.folder), target.seed])
        if key not in self._found:
            notes: list[str] = []
            self._found[key] = list(self._search(replace(target, notes=notes))), notes
        found, notes = self._found[key]
        target.notes += notes
        for tried, texts in found:
            yield self._stage(target, tried, texts)

    def _stage(self, target: Target, tried: int, texts: list[str]) -> Stage:
        return target.stage(tried, prompts=[replace(p, prompt=t) for p, t in zip(target.prompts, texts, strict=True)])

    def _search(self, target: Target) -> Iterator[tuple[int, list[str]]]:
        network = target.public_network() if self.goal.text_only else target.network()
        tokenizer = network.encoders()[0][0]
        texts, cut = shorten_to_fit(tokenizer, [p.prompt for p in target.prompts], self.length)
        if cut:
            target.notes.append(f"{cut} of {len(texts)} prompts lost their last words to make room for the suffix")
        words = usable_words(tokenizer)
        with threads(compute_threads(network)):
            likeness = self.goal.likeness(target, network, texts)
        chunk = CHUNK if self.goal.text_only else target.drawing.batch_size
        scorer = SuffixScorer(network, likeness, texts, words, self.length, chunk)
        chances = [generator(p.seed, f"suffix {target.seed}") for p in target.prompts]
        found: Iterator[tuple[int, Best]]
        if self.method == "random":
            found = random_search(scorer.score, len(words), self.length, self.budgets, self.batch, chances)
        else:
            found = greedy_search(
                scorer.score, scorer.gradient, len(words), self.length, self.budgets, self.batch, self.shortlist,
                chances,
            )  # fmt: skip
        scorer.tell = lambda done: target.tell(f"{done} of {self.budgets[-1]} candidates")
        for tried, best in found:
            yield tried, [f"{text} {words.say(row)}" for text, row in zip(texts, best.suffixes, strict=True)]


class SuffixScorer:
    """Scores of suffixes, and their derivative, for all prompts.

    Args:
        network: encodes.
        likeness: compares with each prompt's goal.
        prompts: P texts without suffix.
        words: what suffixes are made of.
        length: L.
        chunk: suffixed prompts at once.
    """

    def __init__(
        self,
        network: Network,
        likeness: Likeness,
        prompts: Sequence[str],
        words: Words,
        length: int,
        chunk: int = CHUNK,
    ) -> None:
        self.chunk = chunk
        self.network, self.likeness, self.prompts, self.words = network, likeness, list(prompts), words
        self.places = suffix_starts(network.encoders()[0][0], prompts)[:, None] + torch.arange(length)
        self.tell: Callable[[int], None] = lambda _: None
        self._done = 0

    def score(self, candidates: Tensor) -> Tensor:
        """Suffixes (P, K, L) -> scores (P, K)."""
        prompts, count, _ = candidates.shape
        numbers = torch.arange(prompts).repeat_interleave(count)
        texts = [
            f"{self.prompts[n]} {self.words.say(row)}" for n, row in zip(numbers, candidates.flatten(0, 1), strict=True)
        ]
        scores = []
        with threads(compute_threads(self.network)), torch.no_grad():
            for start in range(0, len(texts), self.chunk):
                part = slice(start, start + self.chunk)
                scores.append(self.likeness(self.network.backbone.encode_text(texts[part]), numbers[part]).cpu())
        self._done += count
        self.tell(self._done)
        return torch.cat(scores).view(prompts, count)

    def gradient(self, suffixes: Tensor) -> Tensor:
        """Suffixes (P, L) -> derivative with respect to their one-hot tokens (P, L, V)."""
        found = []
        for start in range(0, len(suffixes), self.chunk):
            part = slice(start, start + self.chunk)
            rows = suffixes[part]
            numbers = torch.arange(len(self.prompts))[part]
            chosen = nn.functional.one_hot(rows, len(self.words)).float().to(self.network.backbone.device)
            chosen.requires_grad_(True)
            texts = [f"{self.prompts[n]} {self.words.say(row)}" for n, row in zip(numbers, rows, strict=True)]
            with threads(compute_threads(self.network)), torch.enable_grad(), self._replaced(chosen, self.places[part]):
                conditioning = self.network.backbone.encode_text(texts)
                found.append(torch.autograd.grad(self.likeness(conditioning, numbers).sum(), chosen)[0].cpu())
        return torch.cat(found)

    def _replaced(self, chosen: Tensor, places: Tensor) -> ExitStack:
        """Within, the suffix tokens' embeddings are `chosen` (n, L, V) times those of the words."""
        stack = ExitStack()
        rows = torch.arange(len(places))[:, None]

        def hook(layer: Any, _: Any, found: Tensor) -> Tensor:
            table = layer.weight[self.words.ids.to(layer.weight.device)].float()
            changed = found.clone()
            changed[rows, places] = (chosen @ table).to(found.dtype)
            return changed

        for _, encoder in self.network.encoders():
            stack.callback(encoder.get_input_embeddings().register_forward_hook(hook).remove)
        return stack
