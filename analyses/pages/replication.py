"""The claims of "Loop, Think, & Generalize" (arXiv 2604.07822) on the shipped miniatures, claim by
claim, with the numbers.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from loopscope.analyses.common.claims import Claim
from loopscope.analyses.common.records import markdown_table, write_text
from loopscope.analyses.pages import multi_hop_claims, two_hop_claims

_CHECKS = (
    multi_hop_claims.extrapolation,
    multi_hop_claims.two_hops_only,
    multi_hop_claims.depth_grows,
    multi_hop_claims.overthinking,
    multi_hop_claims.robustness,
    multi_hop_claims.halting,
    multi_hop_claims.ever_faster,
    multi_hop_claims.shortcut_on_random_graph,
    two_hop_claims.three_stages,
    two_hop_claims.more_iterations,
    two_hop_claims.vanilla,
    two_hop_claims.bridge,
)
_HEAD = """# Claims of the paper, tested on the miniatures

Written by `loopscope replication` from the shipped checkpoints and the logs of their training;
`make minis` trains them again. The paper is "Loop, Think, & Generalize" (arXiv 2604.07822); the
figure numbers are its own. Its models have 28 million parameters and 200 or 2,000 entities. The
miniatures, small models that come with this package, have 0.1 to 1 million parameters and 40 or 80
entities. A claim that holds here appears at this size; a claim that does not hold here may need the
paper's size.

Accuracies are on held-out questions (50 per hop count, up to 200 per two-hop group). R is the
number of iterations in training, and r the number at test; "best over r" is over 1 to 24
iterations. The column *rule* says when the claim counts as shown."""
_BELOW = """## Every accuracy

Multi-hop: questions asked, best accuracy over r and where, accuracy at the last r, and with
adaptive halting (KL < 0.01, entropy < 3). Two hops: accuracy at the training R for each group
of questions."""


def claims() -> list[Claim]:
    """Every claim, measured on the shipped checkpoints."""
    return [check() for check in tqdm(_CHECKS, desc="claims")]


def page(found: list[Claim]) -> str:
    """A table of claims, and below it every accuracy, as Markdown."""
    rows = pd.DataFrame(
        [(c.paper, c.found, c.rule, c.verdict) for c in found],
        columns=["in the paper", "here", "rule", "shown?"],
    )
    multi_hop = (*multi_hop_claims.FIXED, multi_hop_claims.DYNAMIC)
    grids = [
        f"### {name}\n\n{markdown_table(multi_hop_claims.grid(name).summary())}"
        for name in multi_hop
    ]
    two_hop = {
        name: two_hop_claims.by_group(name)
        for name in (*two_hop_claims.LOOPED, *two_hop_claims.VANILLA)
    }
    groups = pd.DataFrame(two_hop).T.reset_index(names="checkpoint")
    return (
        "\n\n".join(
            [_HEAD, markdown_table(rows), _BELOW, *grids, "### Two hops", markdown_table(groups)]
        )
        + "\n"
    )


def write(path: Path) -> Path:
    """Measure everything and write the page, whole or not at all."""
    return write_text(path, page(claims()))
