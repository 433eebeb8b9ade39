"""The public calls, each from where it lives.

This is the one list of them: `loopscope/__init__.py` reads it to import a call when it is first used, and type
checkers and editors read it as the package's interface.
"""

from . import plots as plots
from .checkpoints.catalog import available as available
from .checkpoints.download import fetch as fetch
from .checkpoints.load import (
    load as load,
)
from .checkpoints.load import (
    save as save,
)
from .checkpoints.release import save_release as save_release
from .interp.attribution.direct_logit import direct_logit_attribution as direct_logit_attribution
from .interp.attribution.gradients import gradients as gradients
from .interp.attribution.patching import (
    attribution_patch as attribution_patch,
)
from .interp.circuits.edge_attribution import edge_attribution as edge_attribution
from .interp.circuits.faithfulness import evaluate_circuit as evaluate_circuit
from .interp.circuits.record import Circuit as Circuit
from .interp.circuits.scores import circuit_scores as circuit_scores
from .interp.circuits.search import (
    compare_scores as compare_scores,
)
from .interp.circuits.search import (
    exact_scores as exact_scores,
)
from .interp.circuits.search import (
    search_circuit as search_circuit,
)
from .interp.circuits.selection import (
    prune_circuit as prune_circuit,
)
from .interp.circuits.selection import (
    select_circuit as select_circuit,
)
from .interp.circuits.selection import (
    smallest_circuit as smallest_circuit,
)
from .interp.common.cells import Cell as Cell
from .interp.common.finite import first_nonfinite as first_nonfinite
from .interp.common.metrics import (
    logit_diff as logit_diff,
)
from .interp.common.metrics import (
    logit_margin as logit_margin,
)
from .interp.dictionaries.attribution import feature_attribution as feature_attribution
from .interp.dictionaries.controls import (
    pca_dictionary as pca_dictionary,
)
from .interp.dictionaries.controls import (
    random_dictionary as random_dictionary,
)
from .interp.dictionaries.dictionary import Dictionary as Dictionary
from .interp.dictionaries.examples import top_examples as top_examples
from .interp.dictionaries.graphs.graph import feature_graph as feature_graph
from .interp.dictionaries.labels import feature_labels as feature_labels
from .interp.dictionaries.quality import dictionary_quality as dictionary_quality
from .interp.dictionaries.reading import (
    Reading as Reading,
)
from .interp.dictionaries.reading import (
    loop_states as loop_states,
)
from .interp.dictionaries.sae_files import (
    load_dictionary as load_dictionary,
)
from .interp.dictionaries.sae_files import (
    save_dictionary as save_dictionary,
)
from .interp.dictionaries.splice import (
    FeatureEdit as FeatureEdit,
)
from .interp.dictionaries.splice import (
    splice as splice,
)
from .interp.dictionaries.trainer import DictionaryTraining as DictionaryTraining
from .interp.dictionaries.training import (
    fit_dictionary as fit_dictionary,
)
from .interp.dictionaries.training import (
    train_dictionary as train_dictionary,
)
from .interp.dynamics.attractors import fixed_points as fixed_points
from .interp.dynamics.basins import (
    basins as basins,
)
from .interp.dynamics.basins import (
    restart_vote as restart_vote,
)
from .interp.dynamics.growth import (
    finite_time_exponent as finite_time_exponent,
)
from .interp.dynamics.growth import (
    perturbation_growth as perturbation_growth,
)
from .interp.dynamics.inference_stages import inference_stages as inference_stages
from .interp.dynamics.input_dependence import input_dependence as input_dependence
from .interp.dynamics.jacobian import jacobian_spectrum as jacobian_spectrum
from .interp.dynamics.layers import (
    attention_dynamics as attention_dynamics,
)
from .interp.dynamics.layers import (
    layer_dynamics as layer_dynamics,
)
from .interp.dynamics.lyapunov import lyapunov_spectrum as lyapunov_spectrum
from .interp.dynamics.path_independence import path_independence as path_independence
from .interp.dynamics.states import (
    dynamics as dynamics,
)
from .interp.dynamics.statistics import effective_rank as effective_rank
from .interp.edit.ablation import (
    Component as Component,
)
from .interp.edit.ablation import (
    ablate as ablate,
)
from .interp.edit.injection import (
    attenuate_input as attenuate_input,
)
from .interp.edit.injection import (
    swap_input as swap_input,
)
from .interp.edit.realignment import realign as realign
from .interp.edit.schedule import (
    Freeze as Freeze,
)
from .interp.edit.schedule import (
    schedule_edit as schedule_edit,
)
from .interp.edit.steering import (
    set_to as set_to,
)
from .interp.edit.steering import (
    steer as steer,
)
from .interp.edit.steering import (
    steering_vector as steering_vector,
)
from .interp.exits.exit_gate import (
    exit_distribution as exit_distribution,
)
from .interp.exits.exit_gate import (
    gate_logits as gate_logits,
)
from .interp.exits.exit_gate import (
    readout_at_threshold as readout_at_threshold,
)
from .interp.exits.exit_gate import (
    readout_mixture as readout_mixture,
)
from .interp.exits.exits import (
    AccelerationBelow as AccelerationBelow,
)
from .interp.exits.exits import (
    CosineAbove as CosineAbove,
)
from .interp.exits.exits import (
    EntropyBelow as EntropyBelow,
)
from .interp.exits.exits import (
    KLBelow as KLBelow,
)
from .interp.exits.exits import (
    StepBelow as StepBelow,
)
from .interp.exits.exits import (
    TopStable as TopStable,
)
from .interp.exits.exits import (
    apply_criterion as apply_criterion,
)
from .interp.exits.exits import (
    exits as exits,
)
from .interp.exits.halting import (
    HaltingRule as HaltingRule,
)
from .interp.exits.halting import (
    halting as halting,
)
from .interp.generation import (
    Generated as Generated,
)
from .interp.generation import (
    Sampling as Sampling,
)
from .interp.generation import (
    generate as generate,
)
from .interp.lens.alignment import embedding_alignment as embedding_alignment
from .interp.lens.decoding import (
    decodability as decodability,
)
from .interp.lens.decoding import (
    rank_trajectory as rank_trajectory,
)
from .interp.lens.lens import (
    coda_lens as coda_lens,
)
from .interp.lens.lens import (
    logit_lens as logit_lens,
)
from .interp.lens.lens import (
    readout_lens as readout_lens,
)
from .interp.lens.tuned_lens import TunedLens as TunedLens
from .interp.lens.tuned_training import (
    train_tuned_lens as train_tuned_lens,
)
from .interp.lens.tuned_training import (
    tuned_lens_kl as tuned_lens_kl,
)
from .interp.merging import merge as merge
from .interp.patching.activation import activation_patch as activation_patch
from .interp.patching.path_ends import (
    Receiver as Receiver,
)
from .interp.patching.path_ends import (
    Sender as Sender,
)
from .interp.patching.paths import (
    path_patch as path_patch,
)
from .interp.patching.paths import (
    path_patch_sweep as path_patch_sweep,
)
from .interp.patching.sweep import Sweep as Sweep
from .interp.patching.tracing import (
    causal_tracing as causal_tracing,
)
from .interp.patching.tracing import (
    denoising_map as denoising_map,
)
from .interp.patching.tracing import (
    noising_map as noising_map,
)
from .interp.probes.differences import difference_probe as difference_probe
from .interp.probes.probe import probe as probe
from .interp.probes.transfer import transfer_matrix as transfer_matrix
from .interp.store.collect import collect as collect
from .interp.store.export import (
    export_dataset as export_dataset,
)
from .interp.store.export import (
    export_parquet as export_parquet,
)
from .interp.store.reading import ActivationStore as ActivationStore
from .interp.viewer.graph import viewer_graph as viewer_graph
from .interp.weights.circuits import (
    composition_scores as composition_scores,
)
from .interp.weights.circuits import (
    full_ov as full_ov,
)
from .interp.weights.circuits import (
    full_qk as full_qk,
)
from .interp.weights.circuits import (
    ov_circuit as ov_circuit,
)
from .interp.weights.circuits import (
    qk_circuit as qk_circuit,
)
from .models.basis.tokens import (
    Batch as Batch,
)
from .models.basis.tokens import (
    Readout as Readout,
)
from .models.check import check_family as check_family
from .models.core.cache import LoopCache as LoopCache
from .models.core.registry import register as register
from .models.views import (
    unrolled as unrolled,
)
from .models.views import (
    untied as untied,
)
from .models.wrapped.wrap import wrap as wrap
from .training.runs import train as train

__version__: str
__all__: list[str]

# the module of each call above
_HOME: dict[str, str]
