"""The words of the page of sparse dictionaries."""

TEXT = """# Sparse dictionaries over the iterations: `{checkpoint}`

Written by `loopscope dictionaries`, which trains every dictionary of this page. The states are
those at `{hook}` after each of {loops} iterations, of {train} questions of 2 to
{hops} hops that the checkpoint was trained on ({reads} tokens). The numbers are of {held} other
questions, and those of swaps of further ones; all were held out when the checkpoint was trained.
Features and thresholds are chosen on training questions alone; the settings of training were
settled on another draw of held-out questions. Loops count from 0.

A dictionary has {features} features, of which {k} are on for a token (`per_iteration` has as many
for each iteration; principal components, in both directions, are twice as many as the states are
wide). The crosscoder has {k} on for a token and all its iterations: its code reads the last states
too and is the same at all loops, so that its numbers at early loops and its sharing over loops hold
in part by construction; "nan" stands where they would say nothing. {trained} The random features
of a swap are drawn once for each question and kept at all iterations, except where each iteration
has features of its own.

`shared` is one dictionary for all iterations, `shared, 2 on` the same with 2 features on for a
token (which was chosen by the swaps of this page, not by another draw: with fewer features on, one
alone carries more of an entity), `per_iteration` one for each iteration, `crosscoder` one that
reads all iterations of a token at once and writes all of them with one code. `transcoder` reads
what the last block's MLP reads and writes what it adds, with one coder for all iterations. In
training, each iteration's error counts in units of that iteration's variance: the states grow, and
the early ones would be neglected otherwise.

SHOWS

Directions drawn at random tell entities apart late in the run too: the states have then settled
into one cluster for each entity, and F1 alone says little there. Early iterations and swaps tell
trained features from random directions.

## How much is kept

Features on per token (L0), the share of the states' variance that is explained, and the share of
the answers that is recovered (1 - KL with the dictionary in place of the states of all tokens at
all iterations, over KL with their means in that place; below 0 it is worse than the means). The
crosscoder's code of a token is made from the clean run's states of all iterations, the last one
included, so that its share is no test of what the early iterations keep. Of the features: how many
are never on, and which share of the others is on at several iterations, and at all of them. Every
iteration of `per_iteration` has features of its own.

OVERVIEW

The shared dictionary by iteration. `recovered` is with the dictionary at this iteration alone;
`live` features are on there in at least one token, `new` ones are on there for the first time in
at least one token.

ITERATIONS

## Which feature is which entity

The token at position h stands for the entity after hop h, as soon as that entity has arrived
there: from the iteration on at which the model's readout at that position gives it for at least
0.9 of the questions. For each of {entities} entities and each iteration, the feature and the
threshold that tell the entity's tokens from the others best are chosen on training questions; F1
is of the held-out ones, as a mean over entities. Principal components are taken in both
directions, {k} of them on; random directions and a shared dictionary of a model with random
weights are the other controls.

LABELS

## Do the features cause the answer

The feature of an entity is taken out of the code at the position of that entity, and the feature
of another entity is given its activation ({swaps} held-out questions of each hop count; what the
dictionary leaves out of the states is kept). The graph says which answer should come: the other
entity itself where the answer's own position is edited, or the end of the walk that goes on from
the other entity. The columns are shares of questions with that predicted answer: for the entity's
features, for the entity's feature handed to a random live feature, and for two random live
features, most of which are off there. The last column is the share of answers that change when
the entity's feature is only taken out. An entity on the way is edited after the last block of an
iteration, where the next block reads it. "All that follow" are the iterations from the one on at
which the entity is there, the last one, which the answer is read from, included; "its first" is
that one alone.

CAUSES

## Features to look at

The features that say an entity best at the last iteration of the shared dictionary: the tokens in
which they are strongest, and the words whose logits their direction raises most (without the
final norm).

EXAMPLES

## In code

```python
from loopscope import DictionaryTraining, FeatureEdit, load
from loopscope import dictionary_quality, splice, train_dictionary

model = load("{checkpoint}")
texts = ["<e_12><r_3><r_7>", "<e_5><r_0><r_1>"]
dictionary = train_dictionary(model, texts, training=DictionaryTraining(steps=20))
dictionary_quality(model, dictionary, texts).frame()
with splice(model, dictionary, FeatureEdit(17, loops=[3, 4], scale=0)):
    logits = model(model.to_tokens(texts[0]), n_loops=dictionary.n_loops)
```

`train_dictionary` and `dictionary_quality` also take an `ActivationStore` of the model, which may
be larger than memory. `loopscope feature {checkpoint} --dictionary FOLDER --feature 12` shows one
feature: the inputs in which it is strongest, its profile over loops, its direct effect on logits,
and what its ablation does. `loopscope report` and `loopscope explore` show it with `--dictionary
FOLDER`.

`save_dictionary(dictionary, folder)` writes SAELens's format (cfg.json and
sae_weights.safetensors; one folder per iteration for `per_iteration`; a crosscoder is an
autoencoder of all iterations side by side),
and `load_dictionary` reads it. Neither SAELens nor dictionary_learning is a dependency: SAELens
6.54 needs transformer-lens below 4 and dictionary_learning 0.1 needs nnsight below 0.4, and this
project needs transformer-lens 4.3 or later; both train on one place of a run, without an axis of
iterations. `SAE_LENS_FOLDER=FOLDER make slow`, with SAELens and its transformer-lens installed in a
folder of their own (`pip install --target`), tests that SAELens opens what is written here.
"""
