"""Where weights come from: release formats, safe loading, downloads, and the checkpoints that
travel with the project.

Start with `load.py`. `formats/` says which folders it can open, `tables/` how the releases of each
family are read (one file per family, found by itself), `remote.py` and `download.py` which public
releases there are and how they are brought here. Imports `models` and `tasks`.
"""

from loopscope._one_name import refuse_second_name

refuse_second_name(__name__)
