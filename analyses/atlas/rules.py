"""Questions of the atlas: what of each paper is asked, and when it counts as shown.

The limits were fixed before the numbers of the atlas were measured. Where an earlier page of this
project had shown a number already, `known` says which. Shuffled weights are those of the model with
the entries of each matrix in random order: as large, and without what was learned.
"""

from __future__ import annotations

from dataclasses import replace

from loopscope.analyses.atlas.puzzle_rules import PUZZLE_QUESTIONS
from loopscope.analyses.atlas.question import Question
from loopscope.analyses.common.claims import Bound

REALIGNED = "mini/systematicity/r4_l2/ood"
OTHER_DEPTHS = {
    "2 iterations: ": "mini/systematicity/r2_l2/ood",
    "8 iterations: ": "mini/systematicity/r8_l2/ood",
}
"""Further checkpoints that are realigned, by the words before their numbers."""
_REALIGNMENT = (
    Bound("realigned", "at least", 0.85, 0.75),
    Bound("realigned minus base", "at least", 0.1, 0.05),
)
_CONTROLS = (
    Bound("random entity", "at most", 0.1, 0.2),
    Bound("second-best token", "at most", 0.1, 0.2),
    Bound("rescaled minus base, without its sign", "at most", 0.03, 0.06),
)

QUESTIONS: tuple[Question, ...] = (
    Question(
        name="deeper",
        paper="2604.07822",
        title="Loop, Think, & Generalize",
        claim="More iterations at inference answer questions of more hops than were trained.",
        asked="`mini/multi_hop/r_dyn`, 50 questions of each hop count: hop counts beyond training"
        " that are answered (0.6 right) at the best of 1 to 24 iterations.",
        calls=("readout_lens",),
        figure="loopscope recurrence mini/multi_hop/r_dyn",
        bounds=(
            Bound("hop counts beyond training", "at least", 2, 1),
            Bound("the same with at most 4 iterations", "at most", 0, 1),
        ),
        control=("the same with at most 4 iterations",),
        differs="104 thousand weights and 40 entities, where the paper has 28 million and 200.",
        known="the first number, from the page of claims of this paper",
    ),
    Question(
        name="cycle",
        paper="2604.11791",
        title="A Mechanistic Analysis of Looped Reasoning Language Models",
        claim="Each block of the loop reaches a fixed point of its own, so that an iteration runs"
        " through one cycle, and attention stops changing.",
        asked="`mini/multi_hop/r_dyn`, 50 questions of 5 hops, 24 iterations, all tokens: the"
        " direction of each block's output (medians over tokens) and every head's attention.",
        calls=("layer_dynamics", "attention_dynamics"),
        figure="loopscope layers mini/multi_hop/r_dyn --hops 5 --n-loops 24",
        bounds=(
            Bound("last step of the blocks' directions, the larger", "at most", 0.01, 0.05),
            Bound("distance of the two ends over that step", "at least", 10, 3),
            Bound("last change of attention, the largest of all heads", "at most", 0.01, 0.05),
            Bound("last step over that of shuffled weights", "at most", 0.5, 1),
        ),
        control=("last step of shuffled weights", "last step over that of shuffled weights"),
        differs="Two blocks without prelude, coda or injection, and no norm between iterations, so"
        " directions are compared; the paper's models are language models.",
        known="the lengths of the last steps, which the gallery's table of layers shows in another"
        " unit",
        note="The two ends are near one another on the unit sphere: the cycle is there and small.",
    ),
    Question(
        name="two_scales",
        paper="2509.23314",
        title="Two-Scale Latent Dynamics for Recurrent-Depth Transformers",
        claim="Steps within a loop become small and nearly orthogonal to one another.",
        asked="`mini/multi_hop/r_dyn`, 50 questions of 5 hops, 8 iterations, all tokens: the last"
        " step over the first (median), and the mean cosine of consecutive steps in the second"
        " half.",
        calls=("dynamics",),
        figure="loopscope steps mini/multi_hop/r_dyn --hops 5",
        bounds=(
            Bound("last step over the first", "at most", 0.5, 0.9),
            Bound("cosine of consecutive steps, without its sign", "at most", 0.3, 0.6),
            Bound("cosine with shuffled weights minus cosine", "at least", 0.2, 0.05),
        ),
        control=("cosine with shuffled weights", "cosine with shuffled weights minus cosine"),
        differs="One looped stack, so the larger drift from one looped block to the next cannot be"
        " asked.",
        known="the cosine of the last steps, from the gallery's table of steps",
        note="The stream of this model has no norm between iterations and grows along one"
        " direction: late steps are as large as early ones and parallel, with shuffled weights"
        " too. Small steps are found where the size is taken away: see the directions of"
        " `cycle`.",
    ),
    Question(
        name="latent_chain",
        paper="2507.02199",
        title="Latent Chain-of-Thought? Decoding the Depth-Recurrent Transformer",
        claim="Where the answer is read, intermediate results do not come up before it: there is"
        " little sign of a latent chain of thought.",
        asked="`mini/multi_hop/r_dyn`, 50 questions of 4 hops, 8 iterations: the share of questions"
        " for which the entity one hop before the answer is on top of the logit lens at the"
        " answer's position at some visit before the answer is.",
        calls=("logit_lens", "rank_trajectory"),
        figure="loopscope ranks mini/multi_hop/r_dyn --hops 4",
        bounds=(
            Bound("previous entity first, at the answer's position", "at most", 0.25, 0.5),
            Bound("previous entity first, one position earlier", "at least", 0.9, 0.6),
            Bound("a random entity first, at the answer's position", "at most", 0.1, 0.25),
        ),
        control=(
            "previous entity first, one position earlier",
            "a random entity first, at the answer's position",
        ),
        differs="Arithmetic of Huginn in the paper. No shipped miniature has a coda, so that"
        " readings depend on the decoding method (logit lens or coda lens) cannot be asked.",
        known="nothing",
        note="There is a chain, but it runs along the positions of the relations, where the"
        " control finds it; at the answer's position few steps of it are seen.",
    ),
    Question(
        name="recall",
        paper="2604.15259",
        title="Stability and Generalization in Looped Transformers",
        claim="With the input given again at every iteration and a norm on the stream, a run"
        " reaches the end of its input from any state; without it the end depends on the state"
        " alone.",
        asked="Runs of 50 puzzles that go on from another puzzle's state after the first"
        " iteration, at the state of the board's first cell, on `mini/sudoku/trm` (input given"
        " again, 8 more iterations); beside them 50"
        " questions of 5 hops on `mini/multi_hop/r_dyn` (input given once).",
        calls=("input_dependence",),
        bounds=(
            Bound("dependence on the input, given again", "at least", 0.9, 0.6),
            Bound("distance to the end of the own input", "at most", 0.1, 0.3),
            Bound("dependence on the input, given once", "at most", 0.1, 0.3),
        ),
        control=("dependence on the input, given once",),
        differs="The control is 0 by construction: what an iteration hands on is all that the run"
        " has. The paper trains one architecture with and without recall; these are two models of"
        " two tasks.",
        known="nothing",
    ),
    Question(
        name="stability",
        paper="2605.26733",
        title="Stabilizing Recurrent Dynamics (STARS)",
        claim="Accuracy rises with iterations and then collapses where an iteration is unstable (a"
        " large spectral radius); where it is stable, accuracy stays.",
        asked="Questions of 4 hops on `mini/multi_hop/r2` (trained with 2 iterations) and"
        " `mini/multi_hop/r_dyn` (2 to 8): the fall of accuracy from the best of 1 to 24 iterations"
        " to the last (50 questions), and the median spectral radius of the Jacobian of iteration"
        " 12 (24 questions).",
        calls=("readout_lens", "jacobian_spectrum"),
        figure="loopscope overthinking mini/multi_hop/r2",
        bounds=(
            Bound("fall of r2", "at least", 0.2, 0.1),
            Bound("radius of r2 minus radius of r_dyn", "at least", 0.05, 0),
            Bound("fall of r_dyn", "at most", 0.02, 0.05),
        ),
        control=("fall of r_dyn", "radius of r_dyn"),
        differs="r_dyn is stable because its number of iterations was drawn in training, which is"
        " half of the paper's method; no miniature was trained with its penalty on the radius.",
        known="both falls, from the page of claims of 2604.07822",
        note="Both radii are above 1, as a stream without a norm grows: the radius tells which of"
        " the two models is less stable, and not that r_dyn contracts. Two models are no proof"
        " that the radius is the cause.",
    ),
    Question(
        name="realignment",
        paper="2607.00341",
        title="DiscoLoop",
        claim="The bridge entity can be decoded after the first iterations, but its state is not"
        " aligned with the entity's embedding; putting the embedding in its place, without"
        " training, closes most of the gap out of distribution.",
        asked="`mini/systematicity/r4_l2/ood`, 168 two-hop questions out of distribution; iteration"
        " and variant chosen on one half and reported on the other.",
        calls=("realign",),
        figure=f"loopscope realignment {REALIGNED}",
        bounds=_REALIGNMENT + _CONTROLS,
        control=tuple(bound.number for bound in _CONTROLS),
        differs="One checkpoint of 4 iterations.",
        known="the numbers, from the gallery",
    ),
    Question(
        name="realignment_depths",
        paper="2607.00341",
        title="DiscoLoop",
        claim="The same replacement closes the gap in models of other numbers of iterations.",
        asked="The same limits for `ood` of `mini/systematicity/r2_l2` and `r8_l2`.",
        calls=("realign",),
        figure="loopscope realignment " + " ".join(OTHER_DEPTHS.values()),
        bounds=tuple(
            replace(bound, number=before + bound.number)
            for before in OTHER_DEPTHS
            for bound in _REALIGNMENT + _CONTROLS
        ),
        control=tuple(before + bound.number for before in OTHER_DEPTHS for bound in _CONTROLS),
        differs="One checkpoint for each number of iterations, each trained as its recipe says;"
        " whether more training would close the gap is not asked.",
        known="nothing: the limits are those of the model of 4 iterations, and both models were"
        " trained after they were written",
        note="The gain is there in every model, and is smaller than in the model of 4 iterations."
        " In the model of 8 iterations the rescaled state, which was to be a control, helps by"
        " itself, so there a part of the gain is the state's length.",
    ),
    Question(
        name="wandering",
        paper="enDyNuSD3L",
        title="Lyapunov analysis of loop transformers (OpenReview), and exponents of TRM and HRM"
        " after it",
        claim="Runs that fail wander and runs that succeed contract: the finite-time exponent"
        " tells them apart.",
        asked="`mini/multi_hop/r_dyn`, 250 questions of 12 to 16 hops, 24 iterations: the exponent"
        " of the state's direction, for right and wrong answers.",
        calls=("finite_time_exponent", "lyapunov_spectrum"),
        figure="loopscope lyapunov mini/multi_hop/r_dyn",
        bounds=(
            Bound("AUC of the exponent", "at least", 0.85, 0.7),
            Bound("AUC within one hop count", "at least", 0.75, 0.6),
            Bound("median exponent of wrong answers", "at least", 0.02, 0),
            Bound("median exponent of right answers", "at most", -0.02, 0),
            Bound("AUC minus that of the margin at half depth", "at least", -0.01, -0.2),
        ),
        control=(
            "AUC within one hop count",
            "AUC of the margin at half depth",
            "AUC minus that of the margin at half depth",
        ),
        differs="Models of the paper are Ouro, Huginn, TRM and HRM; here the wrong answers are"
        " those of questions deeper than trained.",
        known="both AUCs and both medians, from the figure of exponents",
        note="The margin at half depth tells wrong answers better than the exponent, so the"
        " exponent describes failures and does not foretell them.",
    ),
    Question(
        name="cancellation",
        paper="enDyNuSD3L",
        title="Lyapunov analysis of loop transformers (OpenReview)",
        claim="Sublayers expand and compress much more than an iteration does as a whole: large"
        " contributions nearly cancel.",
        asked="`mini/multi_hop/r_dyn`, 50 questions of 5 hops, 24 iterations: the sum of the sizes"
        " of the sublayers' shares in the leading exponent of the state's direction, over the size"
        " of the exponent, both as means over the second half of the run.",
        calls=("lyapunov_spectrum",),
        figure="loopscope lyapunov mini/multi_hop/r_dyn --hops 5",
        bounds=(
            Bound("sizes of the shares over the exponent's", "at least", 5, 2),
            Bound("the same over that of shuffled weights", "at least", 1.5, 1),
        ),
        control=("the same with shuffled weights", "the same over that of shuffled weights"),
        differs="Two blocks of attention and MLP; the paper has 25 sublayers in Ouro and an adapter"
        " of the injected input in Huginn, which no shipped miniature has.",
        known="nothing",
        note="The ratio is near 1: the shares of the sublayers have one sign, and hardly anything"
        " cancels. In the paper's Huginn the cancellation lies between the injection and the first"
        " block, and nothing is injected here.",
    ),
    Question(
        name="relational",
        paper="2604.09870",
        title="Relational Preference Encoding in Looped Transformer Internal States",
        claim="Loop states hold a preference between two inputs relationally: a linear probe of"
        " their difference finds it and a probe of each alone does not.",
        asked="`mini/multi_hop/r_dyn`, 350 pairs of questions of 2 to 8 hops with the same"
        " relations and two heads; preferred is the one whose answer has the larger number."
        " Probes at the last visit, a quarter of the pairs held out.",
        calls=("difference_probe",),
        bounds=(
            Bound("difference of two states", "at least", 0.8, 0.65),
            Bound("difference minus comparing two single probes", "at least", 0.1, 0.03),
            Bound("scores that flip with the pair", "at least", 0.95, 0.8),
            Bound("difference with shuffled preferences", "at most", 0.6, 0.65),
        ),
        control=(
            "comparing two single probes",
            "a single probe alone",
            "difference with shuffled preferences",
        ),
        differs="No miniature was trained on preferences. An order of entities is a property of"
        " each entity, so a probe of single states may well find it too.",
        known="nothing",
        note="Two single probes, compared, do as well: an order of entities is a property of each"
        " entity, which one state holds. Only a single probe that does not see the other input"
        " is worse. A preference that no state holds alone would be needed.",
    ),
    *PUZZLE_QUESTIONS,
)
