"""Making the data of a task: a graph, its facts, and the files."""

from __future__ import annotations

from loopscope.analyses.common.configs import MultiHopDataConfig, TwoHopDataConfig
from loopscope.tasks.datasets import write_multi_hop, write_two_hop
from loopscope.tasks.files import refuse_unless_new
from loopscope.tasks.graphs import PermutationGraph, TableGraph
from loopscope.tasks.multi_hop import make_multi_hop
from loopscope.tasks.two_hop import make_two_hop


def make(config: MultiHopDataConfig | TwoHopDataConfig) -> list[str]:
    """Make the data and write them, with progress bars.

    Returns:
        A line for each file that holds facts, and one for the folder.

    Raises:
        ValueError: The folder is not empty, or the sizes do not fit together; nothing is written
            then.
    """
    refuse_unless_new(config.out)
    counts = _multi_hop(config) if isinstance(config, MultiHopDataConfig) else _two_hop(config)
    lines = [f"wrote {config.out / name}: {count:,} facts" for name, count in counts.items()]
    return [*lines, f"wrote {config.out / 'vocab.json'} and {config.out / 'graph.json'}"]


def _multi_hop(config: MultiHopDataConfig) -> dict[str, int]:
    kind = PermutationGraph if config.graph == "permutation" else TableGraph
    graph = kind.random(config.n_entities, config.n_relations, config.seed)
    data = make_multi_hop(
        graph, config.max_hops, config.train, config.test, config.seed, progress=True
    )
    return write_multi_hop(data, config.out, progress=True)


def _two_hop(config: TwoHopDataConfig) -> dict[str, int]:
    graph = TableGraph.two_hop(
        config.n_entities, config.n_relations, config.out_degree, config.ood_share, config.seed
    )
    data = make_two_hop(graph, config.phi, config.iid_share, config.test, config.seed)
    return write_two_hop(data, config.out, progress=True)
