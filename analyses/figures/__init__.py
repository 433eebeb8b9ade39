"""One file per question: its config, its record, its figure.

`answers` is about how good the answers are, `circuit` about where they are carried, `dynamics`
about how the state moves, `training` about how it was learned. Start with
`answers/overthinking.py`.
"""
