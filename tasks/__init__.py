"""The data of the checkpoints: knowledge graphs, their facts and questions, molecule strings.

Start with `graphs.py`; `multi_hop.py` and `two_hop.py` draw the facts, `datasets.py` writes and
reads them in the released file format. `smiles.py` reads molecule strings, `molecules.py` makes
them. Imports nothing else of this project.
"""

from loopscope._one_name import refuse_second_name

refuse_second_name(__name__)
