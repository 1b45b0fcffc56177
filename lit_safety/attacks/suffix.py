"""Suffix search: the words for suffixes, their position in a prompt's tokens, and the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_safety.attacks.network import Network, compute_threads, taught
from lit_safety.attacks.similarity import Likeness, Similarity
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.chance import generator
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.drawing.threads import threads

if TYPE_CHECKING:
    from lit_safety.drawing.prompts import Prompt


@dataclass(frozen=True)
class Words:
    """Tokens that stay the same when they are written as text and read again, so that a suffix can be given as text."""

    ids: Tensor
    """(V,) ids in the tokenizer."""
    texts: list[str]
    """V words."""

    def __len__(self) -> int:
        return len(self.texts)

    def say(self, row: Tensor) -> str:
        """Indices into these words (L,) -> the suffix."""
        return " ".join(self.texts[number] for number in row.tolist())


def usable_words(tokenizer: Any, encoders: Sequence[Any] = ()) -> Words:
    """All tokens of plain letters that are read again as the same single token, sorted by id.

    Args:
        tokenizer: the common tokenizer of all text encoders.
        encoders: text encoders; tokens with a row of zeros in one of their embeddings are left out.

    Raises:
        UserError: there are fewer than two.
    """
    special = set(tokenizer.all_special_ids)
    known = [taught(encoder).tolist() for encoder in encoders]
    candidates = sorted(
        number
        for number in tokenizer.get_vocab().values()
        if number not in special and all(number < len(rows) and rows[number] for rows in known)
    )
    texts = [tokenizer.decode([number]).strip() for number in candidates]
    plain = [(n, text) for n, text in zip(candidates, texts, strict=True) if text.isascii() and text.isalpha()]
    again = tokenizer([text for _, text in plain], add_special_tokens=False)["input_ids"] if plain else []
    kept = [(number, text) for (number, text), ids in zip(plain, again, strict=True) if ids == [number]]
    if len(kept) < 2:
        raise UserError("attack SuffixSearch: the tokenizer has no words that are single tokens")
    return Words(torch.tensor([number for number, _ in kept]), [text for _, text in kept])


def shorten_to_fit(
    tokenizer: Any, prompts: Sequence[str], room: int, user: str = "SuffixSearch: a suffix"
) -> tuple[list[str], int]:
    """Prompts that leave room for this many further tokens, shortened at the end where needed; and how many were cut.

    Raises:
        UserError: no word of a prompt would be left.
    """
    most, cut, kept = tokenizer.model_max_length - room, 0, []
    for prompt in prompts:
        words = prompt.split()
        while words and len(tokenizer(" ".join(words))["input_ids"]) > most:
            words.pop()
        if not words:
            raise UserError(f"attack {user} of {room} tokens leaves no room for `{prompt}`; lower its length")
        cut += len(words) < len(prompt.split())
        kept.append(prompt if len(words) == len(prompt.split()) else " ".join(words))
    return kept, cut


def suffix_starts(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """The position where each prompt's suffix begins (P,): that of the end token."""
    return torch.tensor([len(ids) - 1 for ids in tokenizer(list(prompts))["input_ids"]])


# Random and greedy search for token suffixes, for many prompts at a time. Scores are to be maximised.
#
# Greedy: the gradient of the score with respect to the suffix's one-hot tokens gives, to first order, the effect of
# replacing one token (HotFlip, arXiv 1712.06751). Single replacements are drawn from the best ones and then scored
# (GCG, arXiv 2307.15043). The budget counts the scored candidates of a prompt; a gradient counts as one.


Score = Callable[[Tensor], Tensor]
"""Suffixes (P, K, L), as indices into V words -> scores (P, K): K candidates for each of P prompts."""
Gradient = Callable[[Tensor], Tensor]
"""Suffixes (P, L) -> derivative of each prompt's score with respect to its one-hot tokens (P, L, V)."""


class Best:
    """The best suffix of each prompt so far."""

    def __init__(self, prompts: int, length: int) -> None:
        self.suffixes = torch.zeros(prompts, length, dtype=torch.long)
        self.scores = torch.full((prompts,), -torch.inf)

    def offer(self, candidates: Tensor, scores: Tensor) -> None:
        """For each prompt keep the best of K candidates (P, K, L), if it is better than the earlier best.

        Of equal ones the first is kept. A score of nan is never better.
        """
        scores = torch.where(scores.isnan(), -torch.inf, scores.detach().float().cpu())
        top, place = scores.max(dim=1)
        better = top > self.scores
        chosen = candidates[torch.arange(len(candidates)), place]
        self.suffixes = torch.where(better[:, None], chosen, self.suffixes)
        self.scores = torch.where(better, top, self.scores)


def random_search(
    score: Score, words: int, length: int, budgets: Sequence[int], batch: int, generators: Sequence[torch.Generator]
) -> Iterator[tuple[int, Best]]:
    """Independent uniform suffixes; yields (candidates tried, best) at each budget.

    Args:
        score: the score of candidates.
        words: the number of words V.
        length: the length L of a suffix.
        budgets: rising numbers of candidates.
        batch: candidates that are scored at once.
        generators: one for each prompt, so that a prompt's candidates do not depend on the other prompts.
    """
    best, tried = Best(len(generators), length), 0
    for budget in budgets:
        while tried < budget:
            count = min(batch, budget - tried)
            candidates = torch.stack([torch.randint(words, (count, length), generator=g) for g in generators])
            best.offer(candidates, score(candidates))
            tried += count
        yield tried, best


def greedy_search(
    score: Score,
    gradient: Gradient,
    words: int,
    length: int,
    budgets: Sequence[int],
    batch: int,
    shortlist: int,
    generators: Sequence[torch.Generator],
) -> Iterator[tuple[int, Best]]:
    """Replacements of one token that the gradient suggests; yields (candidates tried, best) at each budget.

    Args:
        score: the score of candidates.
        gradient: the gradient of the score.
        words: the number of words V.
        length: the length L of a suffix.
        budgets: rising numbers of candidates; the first one tried is a random suffix.
        batch: replacements that are scored after each gradient.
        shortlist: for each position, the number of tokens with the highest derivative from which to draw.
        generators: one for each prompt.
    """
    best, tried = Best(len(generators), length), 1
    start = torch.stack([torch.randint(words, (1, length), generator=g) for g in generators])
    best.offer(start, score(start))
    top = torch.empty(0)
    left = 0  # replacements that can still be drawn from the current gradient
    for budget in budgets:
        while tried < budget:
            if left == 0:
                top = gradient(best.suffixes).topk(min(shortlist, words), dim=-1).indices.cpu()
                left = batch
                tried += 1
                continue
            count = min(left, budget - tried)
            candidates = torch.stack(
                [_exchanges(s, t, count, g) for s, t, g in zip(best.suffixes, top, generators, strict=True)]
            )
            best.offer(candidates, score(candidates))
            tried, left = tried + count, left - count
        yield tried, best


def _exchanges(suffix: Tensor, top: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` copies of a suffix (L,), each with one random position replaced from that position's shortlist (L, k)."""
    places = torch.randint(len(suffix), (count,), generator=generator)
    picks = torch.randint(top.shape[1], (count,), generator=generator)
    copies = suffix.repeat(count, 1)
    copies[torch.arange(count), places] = top[places, picks]
    return copies


# Suffix search: a few words after the prompt, chosen so that the model draws what alignment removed.
#
# The result is text, so guards and negative prompts act on it as on any prompt. They are not part of the search, which
# uses only the arm's text encoder (and the denoiser, if the goal needs it).


CHUNK = 64
"""Number of suffixed prompts in one batch of the text encoder, if no denoiser is used."""


class SuffixSearch(Attack):
    """Search for a suffix of each prompt; at each point of the curve the best one so far is drawn.

    Args:
        goal: the function to maximise: ConceptDirection or PredictionMatch, by class_path and init_args.
        method: random needs only scores, greedy also gradients with respect to the tokens.
        length: number of words in the suffix.
        budgets: numbers of candidates for each prompt, one number for each point of the curve.
        batch: candidates that are scored at once; in greedy search after each gradient.
        shortlist: for each position, the number of words with the highest derivative from which greedy search draws.
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
        self.shares_arms = goal.text_only
        self._found: dict[str, tuple[list[tuple[int, list[str]]], list[str]]] = {}

    @property
    def points(self) -> int:
        return len(self.budgets)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.goal.check(attacked)

    def take_shards(self, shards: str) -> None:
        if hasattr(self.goal, "shards"):
            self.goal.shards = shards
            self.goal.settings["shards"] = shards

    def refuses(self, target: Target) -> str | None:
        if (reason := target.text_closed()) is not None:
            return reason
        tokenizers = [p for n, p in target.pipe.components.items() if n.startswith("tokenizer") and p is not None]
        if any(one.get_vocab() != tokenizers[0].get_vocab() for one in tokenizers):
            return "its text encoders do not share one vocabulary"
        return target.unknown() if self.goal.text_only else target.closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        if not self.goal.text_only:
            for tried, texts in self._search(target):
                yield self._stage(target, tried, texts)
            return
        # Arms of one pipeline have the same text encoder, so the search would find the same texts again.
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
        words = usable_words(tokenizer, [encoder for _, encoder in network.encoders()])
        left_out = len(usable_words(tokenizer)) - len(words)
        if left_out:
            target.notes.append(
                f"{left_out} words of the tokenizer are left out because the text encoder was not trained on them"
            )
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
        network: the network that encodes.
        likeness: computes the similarity to each prompt's goal.
        prompts: P texts without suffix.
        words: the words of suffixes.
        length: the length L of a suffix.
        chunk: suffixed prompts in one pass.
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
        """A context in which the suffix tokens' embeddings are `chosen` (n, L, V) times those of the words."""
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
