"""The words of the page of sparse dictionaries."""

TEXT = """# Sparse dictionaries over the iterations: `{checkpoint}`

Written by `loopscope dictionaries`, which trains every dictionary of this page. A sparse
[dictionary](glossary.md#dictionary-feature) writes a state as a sum of few features. This page asks
three questions: how much of the states does a dictionary keep, does a feature stand for an entity,
and do the features cause the answer?

The states are those at `{hook}` after each of {loops} iterations. The dictionaries are trained on
{train} queries of 2 to {hops} hops that the checkpoint was trained on ({reads} tokens). The numbers
are measured on {held} other queries, and those of swaps on further ones; all of these were held out
when the checkpoint was trained. Features and thresholds are chosen on training queries only, and
the settings of training were chosen on yet other held-out queries. Loops count from 0.

The dictionaries:

* `shared`: one for the states of all iterations, with {features} features, of which {k} are on for
  a token;
* `shared, 2 on`: the same with 2 features on. This number was chosen by the swaps of this page, not
  on other queries: with fewer features on, one alone carries more of an entity;
* `per_iteration`: one for each iteration, each of {features} features with {k} on;
* `crosscoder`: reads all iterations of a token at once and writes all of them from one code of {k}
  features. Its code has seen the last states too, and is the same at all loops. So its numbers at
  early loops, and its sharing over loops, hold in part by construction; "nan" stands where a number
  would say nothing;
* `transcoder`: reads what the last block's MLP reads and writes what that MLP adds, with one coder
  for all iterations;
* controls: principal components (in both directions, so twice as many as the states are wide),
  random directions, and a shared dictionary of a model with random weights.

In training, the error of each iteration is divided by that iteration's variance. Otherwise the
early iterations would be neglected, because the states grow. {trained}

The table has the most important numbers. *Aim* is the value that was wanted. *Entity F1* says how
well one feature tells an entity from the others. *Causal precision* is the share of queries whose
answer changes as predicted if the feature of one entity is swapped for that of another. In the row
below it, a random feature that is on somewhere takes its place.

SHOWS

Late in the run random directions tell entities apart too, because the states have then settled into
one cluster for each entity. So F1 alone says little there. Early iterations and swaps show the
difference between trained features and random directions.

## How much is kept

The columns are:

* *on per token*: the features that are on for a token (L0);
* *variance explained*: the share of the states' variance;
* *answers recovered*: the dictionary's output replaces the states of all tokens at all iterations,
  and the answers are compared with the model's own by KL. The number is 1 minus this KL over the KL
  with the mean states in that place. 1 is as good as the model, and below 0 is worse than the
  means;
* *dead*: the number of features that are never on;
* *on at several iterations*, *on at all*: shares of the other features.

The code that the crosscoder makes of a token has read the states of all iterations of the clean
run, the last one included. So its *answers recovered* does not test what the early iterations keep.
Each iteration of `per_iteration` has features of its own, so nothing is shared there.

OVERVIEW

The same for the shared dictionary, by iteration. *recovered* is measured with the dictionary at
this iteration alone. *live* is the number of features that are on there in at least one token, and
*new* the number of those that are on there for the first time in at least one token.

ITERATIONS

## Which feature is which entity

The token at position h stands for the entity after hop h, as soon as this entity has arrived there:
from the iteration on at which the model's [readout](glossary.md#readout-of-an-iteration) at that
position gives it for at least 0.9 of the queries. For each of {entities} entities and each
iteration, one feature and one threshold are chosen on training queries, those that tell the
entity's tokens from the others best. The numbers are F1 on held-out queries, as a mean over
entities: 1 is perfect. Of the principal components, taken in both directions, {k} are on.

LABELS

## Do the features cause the answer

The swap: at the position of an entity, the feature of this entity is taken out of the code, and the
feature of another entity gets its activation. The part of the states that the dictionary does not
explain is kept. {swaps} held-out queries of each hop count are run. The graph says which answer
should come then. If the answer's own position is edited (*answer*), it is the other entity. If an
entity before it is edited (*on the way*), it is the end of the walk that continues from the other
entity; the edit is made after the last block of an iteration, where the next block reads it.

The columns:

* *at iterations*: *all that follow* edits from the iteration at which the entity has arrived up to
  the last one, from which the answer is read; *its first* edits only the iteration of the arrival;
* *entity's features*: the share of queries with the predicted answer;
* *into a random feature*: the same if a random live feature gets the activation of the entity's
  feature;
* *random features*: the same for two random live features, most of which are off there. Random
  features are drawn once for each query and kept at all iterations, except where each iteration has
  features of its own;
* *ablation changes*: the share of answers that change if the entity's feature is only taken out.

CAUSES

## Features to look at

For some entities: the feature of the shared dictionary that tells the entity best at the last
iteration, the tokens in which it is strongest, and the words whose logits its direction raises most
(without the final norm).

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

`splice` runs the model with the dictionary in the place of the states; here feature 17 is switched
off
(`scale=0`) at loops 3 and 4. `train_dictionary` and `dictionary_quality` also take an
[`ActivationStore`](reference/store.md#activationstore) of the model, which may be larger than
memory.

`loopscope feature {checkpoint} --dictionary FOLDER --feature 12` draws one feature: the inputs in
which it is strongest, its profile over loops, its direct effect on logits, and the effect of its
ablation. `loopscope report` and `loopscope explore` show it too with `--dictionary FOLDER`.

`save_dictionary(dictionary, folder)` writes SAELens's format (cfg.json and
sae_weights.safetensors), and `load_dictionary` reads it. `per_iteration` has one folder for each
iteration. A crosscoder is written as an autoencoder of all iterations side by side.

SAELens and dictionary_learning are not dependencies. SAELens 6.54 needs transformer-lens below 4
and dictionary_learning 0.1 needs nnsight below 0.4, while this project needs transformer-lens 4.3
or later. Both train on one place of a run, without an axis of iterations. To test that SAELens
opens the files, install it with its transformer-lens in a folder of their own (`pip install
--target`) and run `SAE_LENS_FOLDER=FOLDER make slow`.

See also: [dictionaries in the reference](reference/dictionaries.md), [see features in a
viewer](howto/interventions/see_a_graph_in_a_viewer.md).
"""
