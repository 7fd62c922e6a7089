"""Calibrate a head's probabilities by temperature scaling, on conversations it was not trained on.

Path probabilities choose the nodes to verify, so a draft token of probability 0.3 has to be
accepted three times in ten. One temperature per depth divides the logits (arXiv 1706.04599): the
one with the least binary cross entropy over the children that a tree would take, each against
"this is the target's token". That is a proper score of just the probabilities that a tree uses.
The usual one, the likelihood of the label among all tokens, also fits tokens that no tree takes,
and is undefined for a label outside the draft vocabulary; here such a label is none of the
children.

Depth k is measured where the labels before it are all in the top `width`, since no other path can
be in a tree. Every response token starts a tree here. In decoding more trees start after a rejected
draft token, where drafting is harder.

Legend: B sequences, T positions, K depths, R measured positions, V draft vocabulary, W children
per node, S ranks, G temperatures, N tree nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headstart.model.checkpoint.fused import rewrite_meta
from headstart.model.checkpoint.head import load_head, read_head_file
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree
from headstart.training.config.schema import Recipe
from headstart.training.data.batching import Batch, Batches, Corpus
from headstart.training.objective.losses import valid_steps
from headstart.training.run.checkpoint import could_not_save

RANKS = 8  # children of a node whose acceptance rates are measured separately
MIN_ROWS = 100  # minimum positions to fit a depth
MAX_ROWS = 20_000
BINS = 15  # for the calibration error
CHUNK_ROWS = 128  # positions whose logits are in memory at once
PATH_TREES = 512  # trees drafted to measure path probabilities
TREES_PER_ROW = 16
PATH_NODES = 32

# Range of the temperature. The sum over the vocabulary is computed at Chebyshev points of its
# logarithm and interpolated in between, to about 0.01 at worst, so that logits need not be kept.
COLDEST, HOTTEST, POINTS = 0.5, 3.0, 11
TEMPERATURES = torch.linspace(math.log(COLDEST), math.log(HOTTEST), 180).exp().tolist()

Report = Callable[[int, int], None]  # positions done, and their maximum


class TooFewRows(ValueError):
    """The conversations have too few tokens to calibrate on."""


@dataclass(frozen=True)
class Calibration:
    """Results of a calibration, under the names of `HeadMeta`, which documents them."""

    temperatures: tuple[float, ...]
    rank_acceptance: tuple[tuple[float, ...], ...]
    calibration_positions: tuple[int, ...]
    calibration_errors: tuple[tuple[float, float], ...]
    path_errors: tuple[float, float]

    def noted(self, meta: HeadMeta) -> HeadMeta:
        return meta.model_copy(update=vars(self))

    def summary(self) -> str:
        before, after = self.path_errors
        temperatures = " ".join(f"{value:.2f}" for value in self.temperatures)
        return (
            f"calibrated on {self.calibration_positions[0]:,} positions: the calibration error of "
            f"paths goes from {before:.3f} to {after:.3f} (temperatures {temperatures})"
        )


@torch.no_grad()
def calibrate(
    head: DraftHead,
    corpus: Corpus,
    *,
    steps: int,
    width: int = 3,
    batch_tokens: int = 4096,
    conversations: int | None = None,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    report: Report | None = None,
) -> Calibration:
    """Fit the temperatures of a head that is ready for decoding, without changing it.

    corpus: responses of the head's target that it was not trained on. About max_rows tokens of the
    first `conversations` (default: all) are used, in an order that the seed decides.
    steps: depths to measure, without those that the head cannot draft or that fewer than MIN_ROWS
    paths reach. width: children per node, RANKS at most.
    batch_tokens: of a forward pass of the target.
    TooFewRows when not even the first depth has enough positions.
    """
    steps = min(steps, head.max_depth or steps)
    batches = _plan(corpus, conversations, batch_tokens, seed)
    found = collect(head, map(corpus.batch, batches), steps, width, max_rows, report)
    depths = [
        candidates for candidates in found if len(candidates) >= MIN_ROWS
    ]  # their number falls with the depth
    if not depths:
        rows = len(found[0])
        raise TooFewRows(
            f"There are {rows} response tokens to calibrate on, and {MIN_ROWS} are needed. Add "
            "conversations."
        )
    temperatures = tuple(round(fit_temperature(candidates, width), 4) for candidates in depths)
    return Calibration(
        temperatures,
        tuple(candidates.rank_acceptance() for candidates in depths),
        tuple(len(candidates) for candidates in depths),
        tuple(
            (_error(candidates, 1.0, width), _error(candidates, temperature, width))
            for candidates, temperature in zip(depths, temperatures, strict=True)
        ),
        _path_errors(head, map(corpus.batch, batches), temperatures, width, seed),
    )


def calibrate_best(folder: Path, target: Target, holdout: Corpus, recipe: Recipe) -> str:
    """Calibrate the best head of a run, once, and return a message about it."""
    if not len(holdout):
        return "The best head is not calibrated: data.holdout keeps no conversations for it."
    meta = read_head_file(folder).meta
    if meta.temperatures:
        return "The best head is calibrated already."
    head = load_head(folder, target)
    try:
        found = calibrate(
            head,
            holdout,
            steps=max(recipe.loss.steps, recipe.eval.depth),
            width=recipe.eval.width,
            batch_tokens=recipe.data.global_batch_tokens,
            seed=recipe.train.seed,
        )
        rewrite_meta(folder, head, found.noted(meta))
    except TooFewRows as error:
        return f"The best head is not calibrated. {error} (data.holdout)"
    except OSError as error:
        raise could_not_save(folder, error) from error
    return f"best head {found.summary()}"


# --- candidates and labels


@dataclass(frozen=True)
class Candidates:
    """A head's candidates at one depth for R positions, and the rank of the label among them.

    top_RS: top-S logits in descending order, minus the first. norms_RG: log of the sum of
    exp(logit / T) over the draft vocabulary, at the Chebyshev points T. rank_R: rank of the label,
    or S when it is not in the top S.
    """

    top_RS: Tensor
    norms_RG: Tensor
    rank_R: Tensor

    @staticmethod
    def of(logits_RV: Tensor, labels_R: Tensor) -> Candidates:
        """Take the candidates of logits. labels_R: indices into V; others for tokens outside it."""
        logits_RV = logits_RV.float()
        best_RS, tokens_RS = logits_RV.topk(min(RANKS, logits_RV.shape[1]), dim=1)
        logits_RV = logits_RV - best_RS[:, :1]
        norms = [(logits_RV / point).exp().sum(1).log() for point in _points()]
        is_label_RS = tokens_RS == labels_R[:, None]
        missed_R1 = ~is_label_RS.any(1, keepdim=True)
        rank_R = torch.cat([is_label_RS, missed_R1], 1).int().argmax(1)
        top_RS = best_RS - best_RS[:, :1]
        # On the CPU first: not every device has float64.
        return Candidates(top_RS.cpu().double(), torch.stack(norms, 1).cpu().double(), rank_R.cpu())

    @staticmethod
    def joined(parts: Iterable[Candidates]) -> Candidates:
        columns = zip(*((part.top_RS, part.norms_RG, part.rank_R) for part in parts), strict=True)
        return Candidates(*map(torch.cat, columns))

    def __len__(self) -> int:
        return len(self.rank_R)

    def children(self, temperature: float, width: int) -> tuple[Tensor, Tensor]:
        """Return R x W: the probabilities of the top W tokens, and whether they are the label."""
        norm_R1 = (self.norms_RG @ _interpolation(temperature))[:, None]
        probability_RW = (self.top_RS[:, :width] / temperature - norm_R1).exp().clamp(max=1)
        places_W = torch.arange(probability_RW.shape[1])
        return probability_RW, self.rank_R[:, None] == places_W

    def rank_acceptance(self) -> tuple[float, ...]:
        """Return the share of positions at which each rank is the label."""
        counts_S = torch.bincount(self.rank_R, minlength=self.top_RS.shape[1] + 1)[:-1]
        return tuple(round(count / len(self), 4) for count in counts_S.tolist())


def collect(
    head: DraftHead,
    batches: Iterable[Batch],
    steps: int,
    width: int,
    max_rows: int = MAX_ROWS,
    report: Report | None = None,
) -> list[Candidates]:
    """Return a head's candidates along responses of its target, per depth.

    max_rows: positions of the first depth.
    """
    parts: list[list[Candidates]] = [[] for _ in range(steps)]
    rows = 0
    for batch in batches:
        for part, candidates in zip(parts, _candidates(head, batch, steps, width), strict=True):
            part.append(candidates)
        rows += len(parts[0][-1])
        if report is not None:
            report(min(rows, max_rows), max_rows)
        if rows >= max_rows:
            break
    return [Candidates.joined(part) for part in parts]


def _candidates(head: DraftHead, batch: Batch, steps: int, width: int) -> Iterator[Candidates]:
    batch = batch.to(head.target.device)
    tokens_BT = batch.tokens_BT
    output = head.target.forward(tokens_BT, lengths_B=batch.lengths_B, taps=head.taps, logits=False)
    hidden = head.unroll(output, tokens_BT, steps)
    valid_KBT = valid_steps(batch, steps)
    exists_BT = torch.ones_like(valid_KBT[0])
    for step in range(steps):
        exists_BT = exists_BT & valid_KBT[step]
        labels_R = _draft_index(head, tokens_BT.roll(-2 - step, dims=1)[exists_BT])
        chunks = zip(
            hidden[step][exists_BT].split(CHUNK_ROWS), labels_R.split(CHUNK_ROWS), strict=True
        )
        candidates = Candidates.joined(
            Candidates.of(head.logits(hidden_RD), chunk_R) for hidden_RD, chunk_R in chunks
        )
        yield candidates
        # The next depth has the positions whose label a tree would have taken.
        taken = min(width, candidates.top_RS.shape[1])
        exists_BT[exists_BT.clone()] = (candidates.rank_R < taken).to(exists_BT.device)


def _draft_index(head: DraftHead, tokens_R: Tensor) -> Tensor:
    """Return tokens as indices into the draft vocabulary; its size for those outside it."""
    ids = head.draft_ids
    if ids is None:
        return tokens_R
    places_R = torch.searchsorted(ids, tokens_R)
    found_R = ids[places_R.clamp(max=len(ids) - 1)] == tokens_R
    return torch.where(found_R, places_R, len(ids))


def _plan(
    corpus: Corpus, conversations: int | None, batch_tokens: int, seed: int
) -> list[list[int]]:
    """Group the conversations into batches, each once, in an order that the seed decides."""
    lengths = corpus.lengths[:conversations]
    batches = Batches(lengths, max(batch_tokens, corpus.longest), seed)
    return [batches.at(place) for place in range(batches.count(1))]


# --- the temperature


def fit_temperature(candidates: Candidates, width: int) -> float:
    """Return the temperature with the least binary cross entropy, of all in TEMPERATURES."""
    losses = []
    for temperature in TEMPERATURES:
        probability_RW, hit_RW = candidates.children(temperature, width)
        losses.append(
            float(torch.nn.functional.binary_cross_entropy(probability_RW, hit_RW.double()))
        )
    return TEMPERATURES[losses.index(min(losses))]


def _points() -> list[float]:
    middle = math.log(COLDEST * HOTTEST) / 2
    half = math.log(HOTTEST / COLDEST) / 2
    return [
        math.exp(middle + half * math.cos(math.pi * (index + 0.5) / POINTS))
        for index in range(POINTS)
    ]


def _interpolation(temperature: float) -> Tensor:
    """Return G: the weight of each point's value at a temperature (Lagrange)."""
    at = math.log(temperature)
    points = [math.log(point) for point in _points()]
    return torch.tensor(
        [
            math.prod((at - other) / (point - other) for other in points if other != point)
            for point in points
        ],
        dtype=torch.float64,
    )


# --- the calibration error


def calibration_error(probability_N: Tensor, hit_N: Tensor) -> float:
    """Return the mean distance of predicted and observed rates, over bins of equal size."""
    order_N = probability_N.argsort(stable=True)
    predicted = probability_N.double()[order_N].tensor_split(BINS)
    observed = hit_N.double()[order_N].tensor_split(BINS)
    apart = sum(abs(float(p.sum() - h.sum())) for p, h in zip(predicted, observed, strict=True))
    return round(apart / len(order_N), 4)


def _error(candidates: Candidates, temperature: float, width: int) -> float:
    probability_RW, hit_RW = candidates.children(temperature, width)
    return calibration_error(probability_RW.flatten(), hit_RW.flatten())


def _path_errors(
    head: DraftHead,
    batches: Iterable[Batch],
    temperatures: tuple[float, ...],
    width: int,
    seed: int,
) -> tuple[float, float]:
    """Return the error over all nodes of drafted trees, without temperatures and with them.

    Only drafted trees hold paths that differ from the target's text.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = TreeShape.dynamic(PATH_NODES, len(temperatures), width)
    nodes: list[list[tuple[Tensor, Tensor]]] = [[], []]
    trees = 0
    own = head.temperatures
    try:
        for batch in batches:
            batch = batch.to(head.target.device)
            for state, anchors_B, rows in _anchored(head, batch, shape.depth, generator):
                for place, used in enumerate(((), temperatures)):
                    head.temperatures = used
                    tree = head.draft(state, shape)
                    hit_BN = path_hits(tree, batch.tokens_BT, anchors_B + 1)
                    drafted_BN = tree.valid_BN[rows, 1:]
                    predicted_N = tree.scores_BN[rows, 1:][drafted_BN].exp()
                    nodes[place].append((predicted_N.cpu(), hit_BN[rows, 1:][drafted_BN].cpu()))
                trees += len(rows)
            if trees >= PATH_TREES:
                break
    finally:
        head.temperatures = own
    before, after = (
        calibration_error(*map(torch.cat, zip(*found, strict=True))) for found in nodes
    )
    return before, after


def _anchored(
    head: DraftHead, batch: Batch, depth: int, generator: torch.Generator
) -> Iterator[tuple[object, Tensor, Tensor]]:
    """Yield decoding states within responses: state, anchors, and the rows that hold one.

    The tree of an anchor t starts at token t + 1, and all labels of its draft tokens are known.
    """
    output = head.target.forward(
        batch.tokens_BT, lengths_B=batch.lengths_B, taps=head.taps, logits=False
    )
    complete_BT = valid_steps(batch, depth).all(0).cpu()
    rows = complete_BT.any(1).nonzero()[:, 0]
    weights_BT = complete_BT.float()
    weights_BT[~complete_BT.any(1), 0] = 1  # drafted too, and ignored
    drawn_BM = torch.multinomial(weights_BT, TREES_PER_ROW, True, generator=generator)
    for anchors_B in drawn_BM.to(batch.tokens_BT.device).T:
        places_BP = torch.arange(int(anchors_B.max()) + 1, device=anchors_B.device)
        places_BP = places_BP.expand(len(anchors_B), -1)
        state = head.advance(
            head.start(len(anchors_B)),
            output.gather(places_BP),
            batch.tokens_BT.gather(1, places_BP + 1),
            anchors_B + 1,
        )
        yield state, anchors_B, rows


def path_hits(tree: Tree, tokens_BT: Tensor, roots_B: Tensor) -> Tensor:
    """Return B x N: whether a sequence continues along the path to a node. roots_B: position of the
    root."""
    places_BN = (roots_B[:, None] + tree.depths_BN).clamp(max=tokens_BT.shape[1] - 1)
    wrong_BN = tree.tokens_BN != tokens_BT.gather(1, places_BN)
    return ~(tree.ancestors_BNN & wrong_BN[:, None]).any(-1)
