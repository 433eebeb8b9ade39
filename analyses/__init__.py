"""Questions about checkpoints: figures, the report, the explorer, the written pages, and the
command line.

Start with `figures/`, one file per question. `common` opens checkpoints and writes records,
`report` and `explorer` put figures on one page, `pages` writes the Markdown of docs/, `atlas` that
of the claims of papers. `cli.py` is the command line, with the commands of `commands.py`;
`standalone.py` draws one figure with its title for it and for `loopscope.plots`. `trials.py` runs
every method on a tiny model of any family, and `circuit_controls.py` sets a circuit beside others.
Imports everything; only the package's own door imports it.
"""

from loopscope._one_name import refuse_second_name

refuse_second_name(__name__)
