"""Methods: pure functions of a model, never methods on it.

One room per question: `lens` (what would it answer here), `patching` (what if this were different),
`attribution` (first-order estimates), `exits` (when would it stop), `dynamics` (how does the state
move), `weights` (what do the heads compose), `probes` (what can be read from it), `circuits` (which
edges carry the answer), `dictionaries` (which sparse features is it made of), `edit` (change it and
go on), `store` (activations on disk), and `generation.py`. `viewer` writes graphs for viewers, and
`drawing` draws. What they share stands in `common`; `shards` divides their work among processes.
Imports `models` alone.
"""

from loopscope._one_name import refuse_second_name

refuse_second_name(__name__)
